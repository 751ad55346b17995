"""ST-VQA: questions about text in photographs from six data sets; task 3, one JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.holdout import check_holdout, held_out
from data.recipes.questions import (
    BAD_ROW,
    NO_TEST_ANSWERS,
    Dropped,
    Question,
    check_split,
    convert_part,
    cut_parts,
    find_file,
    first_there,
    list_rows,
    plain_id,
    to_answers,
)
from data.recipes.record import Part, Record

SPLITS = {"train": "train", "val": "held out of train"}


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    holdout: float = 0.1,
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    rows: int = 2000,
) -> list[Part]:
    """
    Args:
        path: folder of `train_task_3.json`.
        images: folder of the images, by `file_path`, by `train_imgs/<dataset>/<file_name>` or without the first
            folder; `path` unless told.
        holdout: share of the images kept for val; the data set has no validation split of its own.
        Others as in vqav2.
    """
    check_split(split, SPLITS, refused=NO_TEST_ANSWERS)
    check_holdout(split, holdout)
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    return cut_parts(read, path, rows=rows, options=options | {"holdout": holdout})


def read(path: str, options: dict) -> list[Question | Dropped]:
    out: list[Question | Dropped] = []
    for number, row in enumerate(list_rows(find_file(path, "train_task_3.json"), "data")):
        # Not every copy numbers its questions.
        name = row.get("question_id", number)
        file, folder = row.get("file_name"), row.get("dataset")
        place = row.get("file_path") or (f"{folder}/{file}" if file and folder else None)
        if place is None:
            if options["split"] == "train":
                out.append(Dropped(plain_id(name), BAD_ROW))
            continue
        if held_out(place, options["holdout"]) != (options["split"] == "val"):
            continue
        candidates = [place, f"train_imgs/{place}"]
        if folder and file:
            candidates += [f"train_imgs/{folder}/{file}", f"{folder}/{file}"]
        out.append(
            Question(
                name,
                first_there(options["images"], *candidates),
                place,
                row.get("question"),
                to_answers(row.get("answers") or []),
                str(folder or Path(place).parts[0]),
            )
        )
    return out


def convert(part: Part) -> Iterator[Record | Dropped]:
    return convert_part(read, part, source="stvqa")
