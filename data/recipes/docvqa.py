"""DocVQA: questions about pages of scanned documents; one JSON file per split, or parquet that holds the pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, image_bytes, list_rows
from data.recipes.questions import (
    BAD_ROW,
    NO_TEST_ANSWERS,
    Question,
    check_split,
    convert_part,
    convert_rows,
    cut_parts,
    cut_table,
    is_table,
    plain_id,
    to_answers,
    try_row,
)
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": "train", "val": "validation"}
HUB = True
REFUSED = {"test": NO_TEST_ANSWERS}
KEPT = ("docId", "ucsf_document_id", "ucsf_document_page_no")


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    config: str = "DocVQA",
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `<split>_v1.0_withQT.json` or `<split>_v1.0.json`; or a folder of parquet, or a hub id, with
            the same columns and the page in `image`.
        images: folder in which pages are found by `image` or its file name, also in `spdocvqa_images/`; default:
            `path`.
        config: the configuration's name on the hub.
        grouped: training asks all questions about a page in one conversation; with parquet, only those in one shard.
        The other arguments are as in vqav2.
    """
    check_split(split, SPLITS, refused=REFUSED)
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    if is_table(path):
        needs = ("questionId", "question", "image", "answers")
        settings = {"needs": needs, "options": options, "hub": config, "streaming": streaming}
        return cut_table(path, rows=rows, **settings)
    return cut_parts(read, path, rows=rows, options=options)


def read(path: str, options: dict) -> list[Question | Dropped]:
    split = options["split"]
    out: list[Question | Dropped] = []
    for row in list_rows(find_file(path, f"{split}_v1.0_withQT.json", f"{split}_v1.0.json"), "data"):
        if row.get("questionId") is None or not row.get("image"):
            out.append(Dropped(plain_id(row.get("questionId")), BAD_ROW))
            continue
        place = str(row["image"])
        name = Path(place).name
        image = first_there(
            options["images"], place, f"{split}/{place}", f"spdocvqa_images/{name}", f"documents/{name}", name
        )
        make = lambda row, name, image=image, place=place: make_question(row, image, place)
        out.append(try_row(make, row, row["questionId"]))
    return out


def make_question(row: dict, image: str | bytes, image_id: object) -> Question:
    types = [str(kind) for kind in row.get("question_types") or []]
    # Several types are joined by commas, as in the index, so that a filter finds each of them.
    question = Question(
        row["questionId"], image, image_id, row.get("question"), to_answers(row.get("answers") or []), ",".join(types)
    )
    question.meta = {"question_types": types} | {key: row[key] for key in KEPT if row.get(key) is not None}
    return question


def read_row(row: dict, number: int, options: dict) -> Question | Dropped:
    if row.get("questionId") is None or (image := image_bytes(row.get("image"))) is None:
        return Dropped(plain_id(row.get("questionId", number)), BAD_ROW)
    page = "_".join(str(row[key]) for key in KEPT[1:] if row.get(key) is not None)
    return make_question(row, image, page or number)


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        return convert_rows(read_row, part, source="docvqa")
    return convert_part(read, part, source="docvqa")
