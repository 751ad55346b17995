"""TextVQA 0.5.1: questions about text in OpenImages photographs, ten answers each; one JSON file per split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, image_bytes, list_rows, look_for, read_vqa
from data.recipes.questions import (
    BAD_ROW,
    NO_TEST_ANSWERS,
    SHORT,
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

SPLITS = {"train": "train", "val": "val"}
HUB = True
REFUSED = {"test": NO_TEST_ANSWERS}


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    ocr: bool = False,
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `TextVQA_0.5.1_<split>.json` and, for the recognised text, with
            `TextVQA_Rosetta_OCR_v0.2_<split>.json`; or with OpenFlamingo's copy in VQA format,
            `<split>_questions_vqa_format.json` and `<split>_annotations_vqa_format.json`; or a folder of parquet, or a
            hub id, with the original's columns and the photograph in `image` (lmms-lab/textvqa).
        images: folder of `train_images/`, which also holds val's images, or of its files; default: `path`.
        ocr: put the recognised text under the question, as LLaVA does. Scores with and without it are not comparable.
            In evaluation splits, `meta.ocr_tokens` holds it if the files do.
        The other arguments are as in vqav2.
    """
    check_split(split, SPLITS, refused=REFUSED)
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    options |= {"ocr": ocr}
    files = (f"TextVQA_0.5.1_{split}.json", f"{split}_questions_vqa_format.json")
    if look_for(path, *files) is None and is_table(path):
        needs = ("question_id", "question", "image", "answers", *(["ocr_tokens"] if ocr else []))
        return cut_table(path, rows=rows, needs=needs, options=options, streaming=streaming)
    return cut_parts(read, path, rows=rows, options=options)


def read(path: str, options: dict) -> list[Question | Dropped]:
    split = options["split"]
    image = lambda row: first_there(options["images"], f"train_images/{row['image_id']}.jpg", f"{row['image_id']}.jpg")
    original = look_for(path, f"TextVQA_0.5.1_{split}.json")
    if original is None and (questions := look_for(path, f"{split}_questions_vqa_format.json")):
        if options["ocr"]:
            raise ValueError(f"ocr=true: {questions} has no recognised text; take TextVQA_0.5.1_{split}.json")
        return read_vqa(questions, find_file(path, f"{split}_annotations_vqa_format.json"), image=image)
    tokens = {}
    if recognised := look_for(path, f"TextVQA_Rosetta_OCR_v0.2_{split}.json"):
        tokens = {plain_id(row.get("image_id")): row.get("ocr_tokens") for row in list_rows(recognised, "data")}
    out: list[Question | Dropped] = []
    original = original or find_file(path, f"TextVQA_0.5.1_{split}.json")
    for row in list_rows(original, "data"):
        if any(row.get(key) is None for key in ("question_id", "image_id", "question")):
            out.append(Dropped(plain_id(row.get("question_id")), BAD_ROW))
            continue
        seen = row.get("ocr_tokens", tokens.get(plain_id(row["image_id"])))
        if options["ocr"] and seen is None:
            raise ValueError(
                f"ocr=true: {original} has no ocr_tokens for image {row['image_id']} and no "
                f"TextVQA_Rosetta_OCR_v0.2_{split}.json lies beside it; download that file"
            )
        make = lambda row, name, seen=seen: make_question(row, image(row), seen, options)
        out.append(try_row(make, row, row["question_id"]))
    return out


def read_row(row: dict, number: int, options: dict) -> Question | Dropped:
    image = image_bytes(row.get("image"))
    if image is None or any(row.get(key) is None for key in ("question_id", "image_id", "question")):
        return Dropped(plain_id(row.get("question_id", number)), BAD_ROW)
    return make_question(row, image, row.get("ocr_tokens"), options)


def make_question(row: dict, image: str | bytes, seen: list | None, options: dict) -> Question:
    """Convert one row; `seen` is the list of recognised words."""
    meta = {"image_classes": row.get("image_classes"), "ocr_tokens": seen}
    return Question(
        row["question_id"],
        image,
        row["image_id"],
        row["question"],
        to_answers(row.get("answers") or []),
        prompt=f"Reference OCR token: {', '.join(map(str, seen or ()))}\n{SHORT}" if options["ocr"] else SHORT,
        meta={key: value for key, value in meta.items() if value is not None},
    )


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        return convert_rows(read_row, part, source="textvqa")
    return convert_part(read, part, source="textvqa")
