"""OBELICS: web pages as interleaved texts and images, from parquet; images downloaded beforehand or in the parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data.recipes.documents import NO_IMAGE_LEFT, NO_TEXT, check_image, find_image, join_texts, url_name
from data.recipes.questions import check_choice
from data.recipes.record import BAD_ROW, ODD_ROW, Dropped, Part, Record, make_key
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train"}  # val=0.001 holds out a share
HUB = True
UNEQUAL = "another number of images than of texts"
BOTH = "a place holds both an image and a text"


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    names: str = "sha256",
    min_images: int = 1,
    streaming: bool = True,
    rows: int = 1000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder of parquet, or a hub id. Its column `images` holds URLs, or encoded images if built with them.
        images: folder of the images downloaded from the URLs; a missing image is left out of its document.
        names: how these are named: "sha256" of the URL, or "filename", the metadata's `formatted_filename`; with any
            suffix, in one folder or in subfolders of the name's first two letters.
        min_images: documents with fewer remaining images are dropped.
    """
    check_choice("names", names, "sha256", "filename")
    options = {"images": images, "names": names, "min_images": min_images}
    settings = {"needs": ("images", "texts", "metadata"), "hub": "default", "streaming": streaming}
    return cut_rows(Path(path), split=split, rows=rows, options=options, **settings)


def convert(part: Part) -> Iterator[Record | Dropped]:
    for numbers, row in read_rows(part):
        general = read_json_text(row.get("general_metadata")) or {}
        url = general.get("url") if isinstance(general, dict) else None
        name = url or f"{Path(part.path).stem}-{numbers[-1]}"
        try:
            yield convert_page(row, numbers, name, part.options)
        except ODD_ROW:
            yield Dropped(name, BAD_ROW)


def convert_page(row: dict, numbers: tuple[int, ...], name: str, options: dict) -> Record | Dropped:
    cells, texts = row["images"] or [], row["texts"] or []
    if len(cells) != len(texts):
        return Dropped(name, UNEQUAL)
    if any(cell is not None and text is not None for cell, text in zip(cells, texts)):
        return Dropped(name, BOTH)
    notes = read_json_text(row.get("metadata")) or []
    notes = notes if len(notes) == len(cells) else [None] * len(cells)
    parts, files, left_out = [], [], []
    for cell, text, note in zip(cells, texts, notes):
        if text is not None:
            parts.append({"type": "text", "text": text})
        elif cell is not None:
            file, why = check_image(find_file(cell, note or {}, options))
            if file is None:
                left_out.append(why)
                continue
            parts.append({"type": "image"})
            files.append(file)
    parts = join_texts(parts, separator="\n\n")
    if not any(part["type"] == "text" for part in parts):
        return Dropped(name, NO_TEXT)
    if len(files) < options["min_images"]:
        return Dropped(name, NO_IMAGE_LEFT if left_out else "fewer images than min_images")
    record = {"document": parts, "id": name, "source": "obelics"}
    record["meta"] = {"missing_images": len(left_out)}
    # The key has only the row's numbers: URLs make poor keys, and two pages may have the same one.
    return Record(make_key("page", *numbers), record, files, left_out)


def find_file(cell: object, note: dict, options: dict) -> bytes | Path | None:
    """Return the image of a cell: its bytes, or the file downloaded from its URL; None if there is none."""
    if isinstance(cell, dict):
        return cell.get("bytes") or None
    if isinstance(cell, bytes):
        return cell or None
    if not options["images"]:
        raise ValueError("images=... is missing: this parquet holds URLs; name the folder of the fetched images")
    name = url_name(cell) if options["names"] == "sha256" else str(note.get("formatted_filename") or "")
    return find_image(options["images"], name)


def read_json_text(text: object) -> object:
    """Parse a column that holds JSON as a string; None if it is not JSON."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return None
