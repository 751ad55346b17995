"""OK-VQA: questions about COCO photographs that need outside knowledge; the VQA format with raw and stemmed answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import as_list, find_file, look_for, read_json, read_vqa, read_vqa_row
from data.recipes.questions import (
    Question,
    check_choice,
    check_split,
    convert_part,
    convert_rows,
    cut_parts,
    cut_table,
    is_table,
)
from data.recipes.record import Dropped, Part, Record
from data.recipes.vqav2 import coco_2014

SPLITS = {"train": "train2014", "val": "val2014"}
HUB = True


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    field: str = "raw_answer",
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `OpenEnded_mscoco_<split>_questions.json` and `mscoco_<split>_annotations.json`; or a folder
            of parquet, or a hub id, with the photograph in `image` (lmms-lab/OK-VQA: only val, one form per answer).
        images: folder of `train2014/` and `val2014/`, or of their files; default: `path`.
        field: the form of the answers to learn, "raw_answer" or "answer" (its stem). `meta.answers` always holds the
            stems, which the official score compares, and `meta.raw_answers` the raw answers.
        The other arguments are as in vqav2.
    """
    check_split(split, SPLITS)
    check_choice("field", field, "raw_answer", "answer")
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    options |= {"field": field}
    if look_for(path, f"OpenEnded_mscoco_{SPLITS[split]}_questions.json") is None and is_table(path):
        needs = ("question_id", "question", "image", "answers")
        return cut_table(path, rows=rows, needs=needs, options=options, streaming=streaming)
    return cut_parts(read, path, rows=rows, options=options)


def read(path: str, options: dict) -> list[Question | Dropped]:
    name = SPLITS[options["split"]]
    annotations = find_file(path, f"mscoco_{name}_annotations.json")
    header = read_json(annotations)
    subjects = header.get("question_types", {}) if isinstance(header, dict) else {}

    def describe(annotation: dict) -> dict:
        raw = [str(a.get("raw_answer", a.get("answer"))) for a in annotation.get("answers") or []]
        # The type is the code (one to eight, other): subject names contain commas, and commas separate types.
        kind = annotation.get("question_type")
        return {"subject": subjects.get(kind), "raw_answers": raw, "confidence": annotation.get("confidence")}

    return read_vqa(
        find_file(path, f"OpenEnded_mscoco_{name}_questions.json"),
        annotations,
        image=lambda row: coco_2014(options["images"], name, row["image_id"]),
        answer_key=options["field"],
        type_key="question_type",  # `answer_type` is always "other"
        describe=describe,
    )


def read_row(row: dict, number: int, options: dict) -> Question | Dropped:
    question = read_vqa_row(row, number, type_key="question_type")
    given = [a for a in as_list(row.get("answers")) if isinstance(a, dict)]
    if isinstance(question, Question) and given:
        raw = [str(a.get("raw_answer", a.get("answer"))) for a in given]
        question.meta = {"raw_answers": raw}
        question.said = raw if options["field"] == "raw_answer" else None
    return question


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        return convert_rows(read_row, part, source="okvqa")
    return convert_part(read, part, source="okvqa")
