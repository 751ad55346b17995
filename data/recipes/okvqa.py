"""OK-VQA: questions about COCO photographs that need outside knowledge; the VQA format with raw and stemmed answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, read_json, read_vqa
from data.recipes.questions import Question, check_choice, check_split, convert_part, cut_parts
from data.recipes.record import Dropped, Part, Record
from data.recipes.vqav2 import coco_2014

SPLITS = {"train": "train2014", "val": "val2014"}


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    field: str = "raw_answer",
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    rows: int = 2000,
) -> list[Part]:
    """
    Args:
        path: folder of `OpenEnded_mscoco_<split>_questions.json` and `mscoco_<split>_annotations.json`.
        images: folder of `train2014/` and `val2014/`, or of their files; `path` unless told.
        field: the form that is learned, raw_answer as it was given or answer, its stem. `meta.answers` always holds
            the stems, which the official score compares, and `meta.raw_answers` the others.
        Others as in vqav2.
    """
    check_split(split, SPLITS)
    check_choice("field", field, "raw_answer", "answer")
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    return cut_parts(read, path, rows=rows, options=options | {"field": field})


def read(path: str, options: dict) -> list[Question | Dropped]:
    name = SPLITS[options["split"]]
    annotations = find_file(path, f"mscoco_{name}_annotations.json")
    header = read_json(annotations)
    subjects = header.get("question_types", {}) if isinstance(header, dict) else {}

    def describe(annotation: dict) -> dict:
        raw = [str(a.get("raw_answer", a.get("answer"))) for a in annotation.get("answers") or []]
        # The type stays the code, one to eight or other: the subjects' names hold commas, which part types.
        kind = annotation.get("question_type")
        return {"subject": subjects.get(kind), "raw_answers": raw, "confidence": annotation.get("confidence")}

    return read_vqa(
        find_file(path, f"OpenEnded_mscoco_{name}_questions.json"),
        annotations,
        image=lambda row: coco_2014(options["images"], name, row["image_id"]),
        answer_key=options["field"],
        type_key="question_type",  # `answer_type` is "other" throughout
        describe=describe,
    )


def convert(part: Part) -> Iterator[Record | Dropped]:
    return convert_part(read, part, source="okvqa")
