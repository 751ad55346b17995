"""VQAv2: questions about COCO photographs, ten answers each, from the two JSON files of a split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, look_for, read_vqa, read_vqa_row
from data.recipes.questions import (
    NO_TEST_ANSWERS,
    Question,
    check_split,
    convert_part,
    convert_rows,
    cut_parts,
    cut_table,
    is_table,
    plain_id,
)
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": "train2014", "val": "val2014"}
HUB = True
REFUSED = {"test": NO_TEST_ANSWERS}


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `v2_OpenEnded_mscoco_<split>_questions.json` and `v2_mscoco_<split>_annotations.json`; or a
            folder of parquet, or a hub id, with the same columns and the photograph in `image` (lmms-lab/VQAv2: only
            val).
        images: folder of `train2014/` and `val2014/`, or of their files; default: `path`.
        answers: "majority", or "all_distinct" for one training record per distinct answer.
        grouped: training asks all questions about an image in one conversation.
        prompt: which questions carry the line that asks for a short answer: "first", "every" or "none".
    """
    check_split(split, SPLITS, refused=REFUSED)
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    if look_for(path, f"v2_OpenEnded_mscoco_{SPLITS[split]}_questions.json") is None and is_table(path):
        needs = ("question_id", "question", "image", "answers")
        return cut_table(path, rows=rows, needs=needs, options=options, streaming=streaming)
    return cut_parts(read, path, rows=rows, options=options)


def read(path: str, options: dict) -> list[Question | Dropped]:
    name = SPLITS[options["split"]]
    return read_vqa(
        find_file(path, f"v2_OpenEnded_mscoco_{name}_questions.json"),
        find_file(path, f"v2_mscoco_{name}_annotations.json"),
        image=lambda row: coco_2014(options["images"], name, row["image_id"]),
        describe=lambda annotation: {"question_type": annotation.get("question_type")},
    )


def read_row(row: dict, number: int, options: dict) -> Question | Dropped:
    question = read_vqa_row(row, number)
    if isinstance(question, Question):
        question.meta = {"question_type": row.get("question_type")}
    return question


def coco_2014(folder: str, split: str, image_id: object) -> str:
    """Return the path of a COCO 2014 image, whose name has the split: `val2014/COCO_val2014_000000000042.jpg`."""
    name = f"COCO_{split}_{int(plain_id(image_id)):012d}.jpg"
    return first_there(folder, f"{split}/{name}", name)


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        return convert_rows(read_row, part, source="vqav2")
    return convert_part(read, part, source="vqav2")
