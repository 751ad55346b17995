"""Documents of text and images in reading order, and splitting of long texts; shared by the recipes for documents."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

NO_TEXT = "no text"
NO_IMAGE_LEFT = "no image left"
LEFT_OUT = ": left out of its document"
IMAGE_LEFT_OUT = f"image missing{LEFT_OUT}"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", "")

# Where a text is split, in order of preference: after a paragraph's line breaks, after white space, anywhere.
BORDERS = (re.compile(r"(?<=\n)(?=[^\n])"), re.compile(r"(?<=\s)(?=\S)"))


def join_texts(parts: Iterable[dict], *, separator: str) -> list[dict]:
    """Merge neighbouring text parts and drop blank ones."""
    joined: list[dict] = []
    for part in parts:
        if part["type"] == "text" and not part["text"].strip():
            continue
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": f"{joined[-1]['text']}{separator}{part['text']}"}
        else:
            joined.append(part)
    return joined


def url_name(url: str) -> str:
    """Return the file name, without suffix, of an image fetched from a URL: the SHA-256 of the URL."""
    return hashlib.sha256(url.encode()).hexdigest()


def check_image(image: bytes | Path | None) -> tuple[bytes | None, str]:
    """Return (encoded image, ""), or (None, a note with the reason) if it does not open as an image.

    The page keeps its other parts. Files fetched from the web may be error pages under the names of images.
    """
    from data.recipes.writing import Fault, check_images

    if image is None:
        return None, IMAGE_LEFT_OUT
    try:
        check_images([image])
    except Fault as fault:
        return None, f"{fault}{LEFT_OUT}"
    return (image.read_bytes() if isinstance(image, Path) else image), ""


def find_image(folder: str, name: str) -> Path | None:
    """Find an image by name, with or without suffix, in a folder or its subfolder of the name's first two letters."""
    if not name or "/" in name or name.startswith("."):
        return None
    root = Path(folder).expanduser()
    for place in (root / name, root / name[:2] / name):
        for suffix in SUFFIXES:
            if os.path.isfile(path := place.with_name(place.name + suffix)):
                return path
    return None


def cut_text(text: str, limit: int, measure: Callable[[str], int] = len) -> list[str]:
    """Split a text into pieces of at most `limit`: at paragraphs where possible, else at words, else at characters.

    Only white space at the ends of pieces is lost; line breaks within a piece are kept.

    Args:
        measure: returns the length of a text, in characters or tokens.
    """
    pieces: list[str] = []

    def add(units: list[str]) -> None:
        piece = "".join(units).strip()
        # A text can have more tokens than its units have in total.
        if len(units) > 1 and measure(piece) > limit:
            add(units[: len(units) // 2])
            add(units[len(units) // 2 :])
        elif piece:
            pieces.append(piece)

    def cut(text: str, level: int) -> None:
        current: list[str] = []
        size = 0
        for unit in BORDERS[level].split(text) if level < len(BORDERS) else text:
            length = measure(unit.strip()) if len(unit) > 1 else measure(unit)
            if length > limit and level < len(BORDERS):
                add(current)
                current, size = [], 0
                cut(unit, level + 1)
                continue
            length = measure(unit)
            if current and size + length > limit:
                add(current)
                current, size = [], 0
            current.append(unit)
            size += length
        add(current)

    if measure(text.strip()) <= limit:
        add([text])
    else:
        cut(text, 0)
    return pieces
