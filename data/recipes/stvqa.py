"""ST-VQA: questions about text in photographs from six data sets; task 3, one JSON file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, image_bytes, list_rows, look_for
from data.recipes.questions import (
    BAD_ROW,
    CHOICES,
    NO_TEST_ANSWERS,
    Question,
    check_choice,
    check_split,
    converse,
    convert_part,
    cut_parts,
    is_table,
    plain_id,
    to_answers,
)
from data.recipes.record import Dropped, Part, Record
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train", "val": "held out of train"}
HUB = True
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
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `train_task_3.json`; or a folder of parquet, or a hub id, with photographs in `image` and
            their questions in `qas` (vikhyatk/st-vqa).
        images: folder in which images are found by `file_path` or `<dataset>/<file_name>`, also in `train_imgs/`;
            default: `path`.
        holdout: share of the images kept for val; the data set has no validation split of its own.
        The other arguments are as in vqav2.
    """
    check_split(split, SPLITS, refused=REFUSED)
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} is the share of images kept for val; it must be from 0 to below 1")
    if split == "val" and holdout == 0:
        raise ValueError("split=val is what holdout keeps back, and holdout=0; give a share or take splits=train")
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    options |= {"holdout": holdout}
    if look_for(path, "train_task_3.json") is None and is_table(path):
        for key, allowed in CHOICES.items():
            check_choice(key, options[key], *allowed)
        # `read_rows` reads the hub's train split for both; `becomes` is the split a photograph is written to.
        options["becomes"] = options.pop("split")
        settings = {"needs": ("image", "qas"), "options": options, "hub": "", "streaming": streaming}
        return cut_rows(Path(path), split="train", rows=rows, **settings)
    return cut_parts(read, path, rows=rows, options=options)


def read(path: str, options: dict) -> list[Question | Dropped]:
    out: list[Question | Dropped] = []
    for number, row in enumerate(list_rows(find_file(path, "train_task_3.json"), "data")):
        # Some copies have no question ids.
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


def read_photograph(row: dict, number: str, options: dict) -> list[Question] | Dropped | None:
    """Return the questions of a row, or None if its photograph belongs to the other split."""
    image, asked = image_bytes(row.get("image")), row.get("qas")
    if image is None or not isinstance(asked, list) or not all(isinstance(qa, dict) for qa in asked):
        return Dropped(number, BAD_ROW) if options["split"] == "train" else None
    name = hashlib.sha256(image).hexdigest()
    if held_out(name, options["holdout"]) != (options["split"] == "val"):
        return None
    answers = lambda qa: to_answers(qa.get("answers") or qa.get("answer") or [])
    return [Question(f"{number}-{k}", image, number, qa.get("question"), answers(qa)) for k, qa in enumerate(asked)]


def convert_photographs(part: Part) -> Iterator[Record | Dropped]:
    options = part.options | {"split": part.options["becomes"]}
    for numbers, row in read_rows(part):
        group = read_photograph(row, "-".join(map(str, numbers)), options)
        whole = options["grouped"] and options["split"] == "train" or not isinstance(group, list)
        for k, asked in enumerate([group] if whole else [[question] for question in group]):
            if asked is not None:
                yield from converse(asked, *numbers, k, source="stvqa", options=options)


def held_out(image: str, share: float) -> bool:
    """Return whether an image is in val; a hash of its name decides, independently of other rows."""
    digest = hashlib.sha256(image.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        return convert_photographs(part)
    return convert_part(read, part, source="stvqa")
