"""ScienceQA: school questions with two to five options, half of them with an image; the original JSON or parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, image_bytes, read_json
from data.recipes.options import list_options, make_question
from data.recipes.questions import BAD_ROW, LETTER, check_split, describe_files, is_table
from data.recipes.record import Dropped, Part, Record, guard_row
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train", "val": "validation", "test": "test"}
HUB = True
KEPT = ("hint", "grade", "subject", "topic", "category", "skill")


def parts(path: Path, *, split: str, images: str = "", streaming: bool = True, rows: int = 2000) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `problems.json` and `<split>/<id>/image.png` beside it; or the copy derek-thomas/ScienceQA, as
            a folder of parquet or as a hub id.
        images: folder with `train/`, `val/` and `test/`; default: the folder of `problems.json`.
    """
    check_split(split, SPLITS)
    if is_table(path):
        needs = ("question", "choices", "answer")
        return cut_rows(path, split=SPLITS[split], rows=rows, needs=needs, hub="", streaming=streaming)
    file = find_file(path, "problems.json")
    count = len(select(file, split))
    options = {"split": split, "images": images or str(file.parent), "state": describe_files(Path(path))}
    return [Part(str(file), i, min(i + rows, count), options) for i in range(0, count, rows)]


def select(file: str | Path, split: str) -> list[tuple[str, dict]]:
    rows = read_json(file)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{file} holds no object of problems by id; is it the file of another data set?")
    return [(name, row) for name, row in rows.items() if row.get("split") == split]


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        for numbers, row in read_rows(part):
            name = "-".join(map(str, numbers))
            yield from guard_row(make_record(name, row, image_bytes(row.get("image")), *numbers), name)
        return
    chosen = select(part.path, part.options["split"])[part.start : part.stop]
    for number, (name, row) in enumerate(chosen, part.start):
        image = Path(part.options["images"], part.options["split"], name, "image.png") if row.get("image") else None
        yield from guard_row(make_record(name, row, image, number), name)


def make_record(name: str, row: dict, image: bytes | Path | None, *numbers: int) -> Iterator[Record | Dropped]:
    choices, right = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not isinstance(right, int) or not 0 <= right < len(choices):
        yield Dropped(name, BAD_ROW)
        return
    hint = str(row.get("hint") or "").strip()
    lines = [f"Context: {hint}"] if hint else []
    text = "\n".join([*lines, str(row.get("question") or "").strip(), list_options(choices), LETTER])
    content = [*([{"type": "image"}] if image is not None else []), {"type": "text", "text": text}]
    meta = {"choices": choices, "correct_choice_idx": right, "has_image": image is not None}
    meta |= {key: row[key] for key in KEPT if row.get(key)}
    letter, images = chr(ord("A") + right), [image] if image is not None else []
    subject = str(row.get("subject") or "")
    yield from make_question(name, content, images, [letter], *numbers, source="scienceqa", kind=subject, meta=meta)
