"""Documents of text and images in reading order, and long texts cut into several: what the recipes of them share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

NO_TEXT = "no text"
NO_IMAGE_LEFT = "no image left"
LEFT_OUT = ": left out of its document"
IMAGE_LEFT_OUT = f"image missing{LEFT_OUT}"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", "")

# Where a text is cut, in this order: after the line breaks that end a paragraph, after a space, anywhere.
BORDERS = (re.compile(r"(?<=\n)(?=[^\n])"), re.compile(r"(?<=\s)(?=\S)"))


def join_texts(parts: Iterable[dict], *, separator: str) -> list[dict]:
    """The parts with neighbouring texts made one and blank ones left out."""
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
    """The file name, without suffix, under which an image fetched from a URL is looked for: SHA-256 of the URL."""
    return hashlib.sha256(url.encode()).hexdigest()


def check_image(image: bytes | Path | None) -> tuple[bytes | None, str]:
    """A file that opens as an image, or nothing and the note that says why: of a page, a bad image leaves alone.

    What was fetched from the web holds error pages under the names of images.
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
    """An image by its name, with a suffix or without, in a folder or in its folder of the name's first two letters."""
    if not name or "/" in name or name.startswith("."):
        return None
    root = Path(folder).expanduser()
    for place in (root / name, root / name[:2] / name):
        for suffix in SUFFIXES:
            if (path := place.with_name(place.name + suffix)).is_file():
                return path
    return None


def cut_text(text: str, limit: int, measure: Callable[[str], int] = len) -> list[str]:
    """Pieces of at most `limit`: whole paragraphs where they fit, else words, else characters.

    Nothing is lost but the white space at the pieces' ends. Line breaks within a piece stay as they are.

    Args:
        measure: length of a text, in characters or tokens.
    """
    pieces: list[str] = []

    def add(units: list[str]) -> None:
        piece = "".join(units).strip()
        # The tokens of a whole may be more than those of its parts together.
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
