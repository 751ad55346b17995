"""A-OKVQA: questions about COCO photographs with four choices and ten direct answers; one JSON list per split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import as_list, find_file, first_there, image_bytes, list_rows, look_for
from data.recipes.questions import (
    BAD_ROW,
    LETTER,
    NO_TEST_ANSWERS,
    SHORT,
    Question,
    check_choice,
    check_split,
    convert_part,
    convert_rows,
    cut_parts,
    cut_table,
    is_table,
    plain_id,
    to_answers,
)
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": "train", "val": "val"}
HUB = True
REFUSED = {"test": NO_TEST_ANSWERS}
BAD_CHOICE = "correct_choice_idx is not one of the choices"


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    form: str = "direct",
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `aokvqa_v1p0_<split>.json`; or a folder of parquet, or a hub id, with the same columns and the
            photograph in `image` (HuggingFaceM4/A-OKVQA).
        images: folder of COCO's `train2017/` and `val2017/`, or of their files; default: `path`.
        form: "direct" asks for a short answer; "choice" shows the choices and asks for a letter. `meta` holds the
            references of both forms.
        The other arguments are as in vqav2.
    """
    check_split(split, SPLITS, refused=REFUSED)
    check_choice("form", form, "direct", "choice")
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    options |= {"form": form}
    if look_for(path, f"aokvqa_v1p0_{split}.json") is None and is_table(path):
        needs = ("question_id", "question", "image", "choices")
        return cut_table(path, rows=rows, needs=needs, options=options, streaming=streaming)
    return cut_parts(read, path, rows=rows, options=options)


def read(path: str, options: dict) -> list[Question | Dropped]:
    split = options["split"]
    out: list[Question | Dropped] = []
    for row in list_rows(find_file(path, f"aokvqa_v1p0_{split}.json")):
        image = plain_id(row.get("image_id"))
        if not image.isdecimal():
            out.append(Dropped(plain_id(row.get("question_id")), BAD_ROW))
            continue
        file = f"{int(image):012d}.jpg"
        place = first_there(options["images"], f"{split}2017/{file}", file)
        out.append(make_question(row, place, row["image_id"], options["form"]))
    return out


def read_row(row: dict, number: int, options: dict) -> Question | Dropped:
    if (image := image_bytes(row.get("image"))) is None:
        return Dropped(plain_id(row.get("question_id", number)), BAD_ROW)
    return make_question(row, image, row.get("image_id", number), options["form"])


def make_question(row: dict, image: str | bytes, image_id: object, form: str) -> Question | Dropped:
    choices, right = row.get("choices") or [], row.get("correct_choice_idx")
    if row.get("question_id") is None or not isinstance(choices, list):
        return Dropped(plain_id(row.get("question_id")), BAD_ROW)
    direct = to_answers(as_list(row.get("direct_answers")))
    question = Question(row["question_id"], image, image_id, row.get("question"), direct, form, prompt=SHORT)
    question.meta = {
        "choices": choices,
        "correct_choice_idx": right,
        "direct_answers": direct,
        "difficult_direct_answer": bool(row.get("difficult_direct_answer")),
    }
    if form == "choice":
        if not isinstance(right, int) or not 0 <= right < len(choices):
            return Dropped(plain_id(row["question_id"]), BAD_CHOICE)
        lines = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices)]
        question.text = "\n".join([str(row.get("question")).strip(), *lines])
        question.answers, question.prompt = [chr(ord("A") + right)], LETTER
    return question


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        return convert_rows(read_row, part, source="aokvqa")
    return convert_part(read, part, source="aokvqa")
