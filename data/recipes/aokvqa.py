"""A-OKVQA: questions about COCO photographs with four choices and ten direct answers; one JSON list a split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, list_rows
from data.recipes.questions import (
    BAD_ROW,
    LETTER,
    NO_TEST_ANSWERS,
    SHORT,
    Question,
    check_choice,
    check_split,
    convert_part,
    cut_parts,
    plain_id,
    to_answers,
)
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": "train", "val": "val"}
REFUSED = {"test": NO_TEST_ANSWERS}
BAD_CHOICE = "correct_choice_idx is none of the choices"


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    form: str = "direct",
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    rows: int = 2000,
) -> list[Part]:
    """
    Args:
        path: folder of `aokvqa_v1p0_<split>.json`.
        images: folder of COCO's `train2017/` and `val2017/`, or of their files; `path` unless told.
        form: direct asks for a short answer; choice shows the choices and asks for a letter. The references of both
            are in `meta` either way.
        Others as in vqav2.
    """
    check_split(split, SPLITS, refused=REFUSED)
    check_choice("form", form, "direct", "choice")
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    return cut_parts(read, path, rows=rows, options=options | {"form": form})


def read(path: str, options: dict) -> list[Question | Dropped]:
    split, form = options["split"], options["form"]
    out: list[Question | Dropped] = []
    for row in list_rows(find_file(path, f"aokvqa_v1p0_{split}.json")):
        name = plain_id(row.get("question_id"))
        choices, right, image = row.get("choices") or [], row.get("correct_choice_idx"), plain_id(row.get("image_id"))
        if row.get("question_id") is None or not image.isdecimal() or not isinstance(choices, list):
            out.append(Dropped(name, BAD_ROW))
            continue
        direct = to_answers(row.get("direct_answers") or [])
        file = f"{int(image):012d}.jpg"
        question = Question(
            row["question_id"],
            first_there(options["images"], f"{split}2017/{file}", file),
            row["image_id"],
            row.get("question"),
            direct,
            form,
            prompt=SHORT,
            meta={
                "choices": choices,
                "correct_choice_idx": right,
                "direct_answers": direct,
                "difficult_direct_answer": bool(row.get("difficult_direct_answer")),
            },
        )
        if form == "choice":
            if not isinstance(right, int) or not 0 <= right < len(choices):
                out.append(Dropped(name, BAD_CHOICE))
                continue
            lines = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices)]
            question.text = "\n".join([str(row.get("question")).strip(), *lines])
            question.answers, question.prompt = [chr(ord("A") + right)], LETTER
        out.append(question)
    return out


def convert(part: Part) -> Iterator[Record | Dropped]:
    return convert_part(read, part, source="aokvqa")
