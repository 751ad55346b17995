"""MathVista: mathematics in pictures, with the form of the answer stated; parquet, or JSON with an image folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, image_bytes, read_json
from data.recipes.options import make_question
from data.recipes.questions import BAD_ROW, NO_TEST_ANSWERS, check_split, describe_files, is_table
from data.recipes.record import Dropped, Part, Record, guard_row
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"val": "testmini"}
HUB = True
REFUSED = {"test": NO_TEST_ANSWERS}
KEPT = ("task", "category", "context", "grade", "skills", "language", "source")


def parts(path: Path, *, split: str, images: str = "", streaming: bool = True, rows: int = 500) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `testmini.json` and `images/`; or a folder of parquet (`testmini-*.parquet`), or the hub id
            AI4Math/MathVista, with the picture in `decoded_image`.
        images: folder of the pictures; default: the folder of the JSON.
    """
    check_split(split, SPLITS, refused=REFUSED)
    if is_table(path):
        needs = ("pid", "question", "answer", "decoded_image")
        return cut_rows(path, split=SPLITS[split], rows=rows, needs=needs, hub="default", streaming=streaming)
    file = find_file(path, "testmini.json")
    count = len(read_problems(file))
    options = {"images": images or str(file.parent), "state": describe_files(Path(path))}
    return [Part(str(file), i, min(i + rows, count), options) for i in range(0, count, rows)]


def read_problems(file: str | Path) -> list[dict]:
    rows = read_json(file)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{file} holds no object of problems by id; is it the file of another data set?")
    return [{"pid": name} | row for name, row in rows.items()]


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        for numbers, row in read_rows(part):
            made = make_record(row, image_bytes(row.get("decoded_image")), *numbers)
            yield from guard_row(made, row.get("pid"))
        return
    for number, row in enumerate(read_problems(part.path)[part.start : part.stop], part.start):
        place = str(row.get("image") or "")
        image = Path(first_there(part.options["images"], place, f"images/{place}"))
        yield from guard_row(make_record(row, image, number), row["pid"])


def make_record(row: dict, image: bytes | Path | None, *numbers: int) -> Iterator[Record | Dropped]:
    name, answer = str(row.get("pid") or ""), row.get("answer")
    if not name or image is None or answer is None or not row.get("question"):
        yield Dropped(name, BAD_ROW)
        return
    choices = row.get("choices") or None
    text = str(row.get("query") or "").strip() or put(row, choices)
    about = row.get("metadata") or {}
    meta = {key: about.get(key) for key in KEPT} | {key: row.get(key) for key in ("answer_type", "precision", "unit")}
    meta = {key: value for key, value in (meta | {"choices": choices}).items() if value not in (None, "", [])}
    said = chr(ord("A") + choices.index(answer)) if choices and answer in choices else None
    yield from make_question(
        name,
        [{"type": "image"}, {"type": "text", "text": text}],
        [image],
        [str(answer)],
        *numbers,
        source="mathvista",
        said=said,
        image_id=row.get("image"),
        kind=str(row.get("question_type") or ""),
        meta=meta,
    )


def put(row: dict, choices: list[str] | None) -> str:
    """Build the query of a row that has none: a hint on the form of the answer, the question, the options."""
    if choices:
        hint = "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
        listed = [f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices)]
    else:
        kind = {"integer": "an integer", "float": "a floating-point number", "list": "a Python list"}
        hint = f"Please answer the question requiring {kind.get(row.get('answer_type'), 'a short')} answer."
        listed = []
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    return "\n".join(
        [f"Hint: {hint}", f"Question: {row['question']}{unit}", *(["Choices:", *listed] if listed else [])]
    )
