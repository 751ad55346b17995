"""POPE: yes/no questions on whether an object is in a photograph, in three categories of absent objects; test only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, look_for, read_vqa_row
from data.recipes.questions import (
    BAD_ROW,
    Question,
    check_split,
    convert_part,
    convert_rows,
    cut_parts,
    cut_table,
    is_table,
    to_answers,
)
from data.recipes.record import Dropped, Part, Record

SPLITS = {"test": "coco"}
HUB = True
CATEGORIES = ("random", "popular", "adversarial")


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    dataset: str = "coco",
    prompt: str = "first",
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `<dataset>_pope_<category>.json` (JSON lines) for all three categories; or a folder of
            parquet, or a hub id, with `question`, `answer`, `category` and the photograph in `image` (lmms-lab/POPE).
        images: folder of COCO's `val2014/`, or of its files; default: `path`.
        dataset: first word of the file names.
        prompt: as in vqav2.
    """
    check_split(split, SPLITS)
    common = {"split": split, "images": images or str(path), "answers": "majority", "grouped": False, "prompt": prompt}
    if look_for(path, *(f"{dataset}_pope_{CATEGORIES[0]}.{kind}" for kind in ("json", "jsonl"))) is None and is_table(
        path
    ):
        needs = ("question_id", "question", "image", "answer", "category")
        return cut_table(path, rows=rows, needs=needs, options=common, streaming=streaming)
    made = []
    for category in CATEGORIES:
        file = find_file(path, f"{dataset}_pope_{category}.json", f"{dataset}_pope_{category}.jsonl")
        made += cut_parts(read, file, rows=rows, options=common | {"category": category})
    return made


def read(path: str, options: dict) -> list[Question | Dropped]:
    category = options["category"]
    out: list[Question | Dropped] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); download it again") from None
        if not isinstance(row, dict) or any(row.get(key) is None for key in ("question_id", "image", "text", "label")):
            out.append(Dropped(f"line {number}", BAD_ROW))
            continue
        image = str(row["image"])
        out.append(
            Question(
                row["question_id"],
                first_there(options["images"], f"val2014/{image}", image),
                image,
                row["text"],
                to_answers(row["label"]),
                category,
                meta={"category": category},
            )
        )
    return out


def read_row(row: dict, number: int, options: dict) -> Question | Dropped:
    question = read_vqa_row(row, number, answers="answer", type_key="category")
    if isinstance(question, Question):
        question.image_id = row.get("image_source", question.image_id)
        question.meta = {"category": question.type}
    return question


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        yield from convert_rows(read_row, part, source="pope")
        return
    # Each file numbers its questions from 1, so the category makes keys unique.
    for made in convert_part(read, part, source="pope"):
        if isinstance(made, Record):
            made.key = f"{part.options['category']}-{made.key}"
        yield made
