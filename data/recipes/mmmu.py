"""MMMU: college questions with one to seven images in the question and options; parquet, one folder per subject."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import image_bytes
from data.recipes.options import list_options, make_question
from data.recipes.questions import BAD_ROW, LETTER, NO_TEST_ANSWERS, SHORT, check_split
from data.recipes.record import Dropped, Part, Record, guard_row, make_key
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "dev", "val": "validation"}
HUB = True
REFUSED = {"test": NO_TEST_ANSWERS}
MAX_IMAGES = 7
MARKER = re.compile(r"<image (\d+)>")
KEPT = ("subfield", "topic_difficulty", "img_type")
SUBJECT_WORDS = (
    "Accounting Agriculture Architecture_and_Engineering Art Art_Theory Basic_Medical_Science Biology Chemistry "
    "Clinical_Medicine Computer_Science Design Diagnostics_and_Laboratory_Medicine Economics Electronics "
    "Energy_and_Power Finance Geography History Literature Manage Marketing Materials Math Mechanical_Engineering "
    "Music Pharmacy Physics Psychology Public_Health Sociology"
)
SUBJECTS = tuple(SUBJECT_WORDS.split())


def parts(path: Path, *, split: str, name: tuple = (), streaming: bool = True, rows: int = 500) -> list[Part]:
    """Return the parts of a split, one per shard; train is dev, five questions per subject meant as examples.

    Args:
        path: the hub id MMMU/MMMU, or a folder with its files, `<Subject>/<split>-*.parquet`.
        name: subjects; default: all.
    """
    check_split(split, SPLITS, refused=REFUSED)
    if unknown := [word for word in name if word not in SUBJECTS]:
        raise ValueError(f"name={unknown[0]} is not a subject of MMMU; they are {', '.join(SUBJECTS)}")
    there = [subject for subject in name or SUBJECTS if not path.exists() or (path / subject).is_dir()]
    if not there:
        raise ValueError(f"path={path}: no folder of a subject in it, such as {(name or SUBJECTS)[0]}/")
    settings = {"split": SPLITS[split], "rows": rows, "needs": ("id", "question", "answer"), "streaming": streaming}
    made = []
    for subject in there:
        where, options = (path / subject if path.exists() else path), {"number": SUBJECTS.index(subject)}
        made += cut_rows(where, hub=subject, options=options, **settings)
    return made


def convert(part: Part) -> Iterator[Record | Dropped]:
    for numbers, row in read_rows(part):
        yield from guard_row(make_record(row, part.options["number"], *numbers), row.get("id"))


def make_record(row: dict, *numbers: int) -> Iterator[Record | Dropped]:
    name = str(row.get("id") or "")
    pictures = {i: image_bytes(row.get(f"image_{i}")) for i in range(1, MAX_IMAGES + 1)}
    try:
        options = as_list(row.get("options") or "[]")
        answers = [str(a) for a in as_list(row["answer"])] if row.get("answer") is not None else []
    except (ValueError, SyntaxError):
        yield Dropped(name or make_key(None, *numbers), BAD_ROW)
        return
    choice = row.get("question_type") != "open" and bool(options)
    if not name or not answers or answers == ["?"]:
        yield Dropped(name or make_key(None, *numbers), BAD_ROW)
        return
    text = str(row.get("question") or "").strip()
    lines = [text, list_options(options), LETTER] if choice else [text, SHORT]
    content, images = place_images("\n".join(lines), pictures)
    subject = "_".join(name.split("_")[1:-1])
    meta = {key: row[key] for key in KEPT if row.get(key)} | ({"choices": options} if choice else {})
    yield from make_question(name, content, images, answers, *numbers, source="mmmu", kind=subject, meta=meta)


def as_list(value: object) -> list:
    """Return a value as a list: the files hold list literals as strings; any other value is wrapped."""
    if isinstance(value, str):
        value = ast.literal_eval(value) if value[:1] == "[" and value[-1:] == "]" else [value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def place_images(text: str, pictures: dict[int, bytes | None]) -> tuple[list[dict], list[bytes]]:
    """Replace markers such as `<image 2>` by image parts; pictures that no marker names come first.

    A marker without a picture stays text. A line break directly after the leading images is removed.
    """
    named = {int(number) for number in MARKER.findall(text)}
    content: list[dict] = []
    images: list[bytes] = []
    for number, picture in pictures.items():
        if picture is not None and number not in named:
            content.append({"type": "image"})
            images.append(picture)
    at = 0
    for marker in MARKER.finditer(text):
        picture = pictures.get(int(marker[1]))
        if picture is None:
            continue
        add_text(content, text[at : marker.start()])
        content.append({"type": "image"})
        images.append(picture)
        at = marker.end()
    add_text(content, text[at:])
    return content, images


def add_text(content: list[dict], text: str) -> None:
    # Only behind leading images: breaks between options and before the instruction are part of the prompt.
    if content and all(part["type"] == "image" for part in content):
        text = text.removeprefix("\n")
    if text:
        content.append({"type": "text", "text": text})
