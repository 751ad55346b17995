"""ST-VQA: questions about text in photographs from six data sets; task 3, one JSON file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, list_rows
from data.recipes.questions import (
    BAD_ROW,
    NO_TEST_ANSWERS,
    Question,
    check_split,
    convert_part,
    cut_parts,
    plain_id,
    to_answers,
)
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": "train", "val": "held out of train"}
REFUSED = {"test": NO_TEST_ANSWERS}


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
    check_split(split, SPLITS, refused=REFUSED)
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} is the share of images kept for val; it must be from 0 to below 1")
    if split == "val" and holdout == 0:
        raise ValueError("split=val is what holdout keeps back, and holdout=0; give a share or take splits=train")
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
        if held_out(str(place), options["holdout"]) != (options["split"] == "val"):
            continue
        place = str(place)
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


def held_out(image: str, share: float) -> bool:
    """Whether an image is validation's: by a hash of its name, so that no other row changes it."""
    digest = hashlib.sha256(image.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def convert(part: Part) -> Iterator[Record | Dropped]:
    return convert_part(read, part, source="stvqa")
