"""Parquet rows of `images` and `texts`, one folder per subset; shared by the recipes cauldron and finevision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data.recipes.conversations import name_row
from data.recipes.pictures import find_image
from data.recipes.record import (
    MISMATCH,
    NO_TURNS,
    Dropped,
    Part,
    Record,
    Unusable,
    keep_texts,
    make_key,
    make_messages,
    make_turns,
)
from data.recipes.rows import cut_rows, find_files, read_rows

MARKER_IS_WORD = "<image> in a text, where no image is meant: a word"
RATINGS = ("relevance", "image_correspondence", "formatting", "visual_dependency")


def cut_subsets(path: Path, *, source: str, split: str, name: Sequence[str], streaming: bool, rows: int) -> list[Part]:
    """Split the named subsets, or all subsets of a folder, into parts.

    Raises:
        ValueError: a subset does not exist or contains another, or `path` is a hub id and `name` is empty.
    """
    settings = {"split": split, "rows": rows, "needs": ("images", "texts"), "streaming": streaming}
    if not path.exists() and not name:
        raise ValueError(f"path={path}: name the subsets to take from the hub, such as name=ai2d,vqav2")
    if path.is_dir():
        there = sorted({f.parent.relative_to(path).as_posix() for f in find_files(path, suffixes=(".parquet",))})
        missing = [word for word in name if word not in there]
        if missing:
            raise ValueError(
                f"name={','.join(name)}: {path} has no subset {missing[0]} (it has {', '.join(there[:9])})"
            )
        name = [word for word in there if not name or word in name]
        for outer in name:
            if inner := [n for n in there if n != outer and (outer == "." or n.startswith(f"{outer}/"))]:
                raise ValueError(
                    f"{path}: parquet lies in {outer} and below it, in {inner[0]}, and would be read twice; move one "
                    "of them, or name the subsets: name=..."
                )
    parts = []
    for number, subset in enumerate(name or [path.stem]):
        options = {"source": source, "subset": path.name if subset == "." else subset, "number": number}
        parts += cut_rows(path / subset if path.is_dir() else path, options=options, hub=subset, **settings)
    return parts


def convert(part: Part) -> Iterator[Record | Dropped]:
    options = part.options
    for numbers, row in read_rows(part):
        try:
            images = [find_image(value, ()) for value in row.get("images") or []]
            texts = row.get("texts")
            if not isinstance(texts, list) or not texts:
                raise Unusable(NO_TURNS)
            pairs = zip(make_turns(texts, role="user", text="assistant"), texts)
            turns = [turn for (user, answer), _ in pairs for turn in (("user", user), ("assistant", answer))]
            messages, notes = place_images(turns, len(images))
        except Unusable as fault:
            yield Dropped(f"{options['subset']} {name_row(None, numbers)}", str(fault))
            continue
        meta = {"turns": len(texts), "subset": options["subset"], "origin": row.get("source") or texts[0].get("source")}
        if any(f"{rating}_ratings" in row for rating in RATINGS):
            nothing = [None] * len(texts)
            meta["ratings"] = {rating: row.get(f"{rating}_ratings") or nothing for rating in RATINGS}
        record = {"messages": messages, "id": None, "source": options["source"], "meta": meta}
        yield Record(make_key(options["subset"], options["number"], *numbers), record, images, notes)


def place_images(turns: list[tuple[object, object]], num_images: int) -> tuple[list[dict], list[str]]:
    """Return messages and notes, with all images before the first question or at an equal number of markers.

    If there are markers but not as many as images, they are kept as text.

    Raises:
        Unusable: see `make_messages`.
    """
    try:
        return make_messages(turns, num_images=num_images, images_first=True)
    except Unusable as fault:
        if str(fault) != MISMATCH:
            raise
    messages, notes = make_messages(keep_texts(turns), num_images=num_images, images_first=True)
    return messages, [*notes, MARKER_IS_WORD]
