"""Chat messages of JSON, JSONL or parquet: `<image>` in strings with an `images` list, or OpenAI's lists of parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.conversations import name_row
from data.recipes.pictures import find_image, find_roots, list_images, name_images
from data.recipes.record import (
    MISMATCH,
    Dropped,
    Part,
    Record,
    Unusable,
    make_key,
    make_messages,
    make_turns,
    split_markers,
)
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train"}
HUB = True
UNKNOWN_PART = "content part of an unknown type"
OTHER_MEDIA = {"videos": "video: only images are read", "audios": "audio: only images are read"}


def parts(
    path: Path, *, split: str, images: tuple = (), name: str = "", streaming: bool = True, rows: int = 2000
) -> list[Part]:
    options = {"source": "messages", "roots": find_roots(path, images)}
    return cut_rows(path, split=split, rows=rows, needs=("messages",), options=options, hub=name, streaming=streaming)


def convert(part: Part) -> Iterator[Record | Dropped]:
    for numbers, row in read_rows(part):
        id = row.get("id")
        try:
            for name, fault in OTHER_MEDIA.items():
                if row.get(name):
                    raise Unusable(fault)
            turns, values = place_images(make_turns(row.get("messages"), role="role", text="content"), list_images(row))
            if row.get("system"):
                turns = [("system", row["system"]), *turns]
            images = [find_image(value, part.options["roots"]) for value in values]
            messages, notes = make_messages(turns, num_images=len(images))
        except Unusable as fault:
            yield Dropped(name_row(id, numbers), str(fault))
            continue
        meta = {"turns": sum(m["role"] == "user" for m in messages)} | name_images(values)
        record = {"messages": messages, "id": id, "source": part.options["source"], "meta": meta}
        yield Record(make_key(id, *numbers), record, images, notes)


def place_images(turns: list[tuple], listed: list) -> tuple[list[tuple], list]:
    """Return turns with lists of parts, and the images in the order of these parts.

    An `<image>` marker, or an image part without its own image, takes the next image of `listed`.

    Raises:
        Unusable: a part has an unknown type, or the markers do not use up exactly the listed images.
    """
    rest = iter(listed)
    images, placed = [], []
    try:
        for role, content in turns:
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if not isinstance(content, list):
                placed.append((role, content))
                continue
            new = []
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    split = split_markers(part["text"])
                    images += [next(rest) for piece in split if piece["type"] == "image"]
                    new += split
                elif kind in ("image", "image_url", "input_image"):
                    images.append(own_image(part) or next(rest))
                    new.append({"type": "image"})
                else:
                    raise Unusable(UNKNOWN_PART)
            placed.append((role, new))
    except (StopIteration, RuntimeError):
        raise Unusable(MISMATCH) from None
    if next(rest, None) is not None:
        raise Unusable(MISMATCH)
    return placed, images


def own_image(part: dict) -> object:
    """Return the image a part names: `image_url` (a string or `{"url"}`), `image`, `path`, `url` or `base64`."""
    for key in ("image_url", "image", "path", "url"):
        value = part.get(key)
        if isinstance(value, dict):
            value = value.get("url") or value.get("bytes") or value.get("path")
        if value:
            return value
    return f"data:image/any;base64,{part['base64']}" if part.get("base64") else None
