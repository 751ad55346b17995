"""Find a row's images: file names below one or several folders, bytes of a parquet column, data: URLs."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from data.recipes.record import IMAGE_MISSING, Unusable

NOT_A_NAME = "image is neither a file name nor bytes"
OUTSIDE = "image outside its folder"
REMOTE = "image is a web address"
BAD_DATA_URL = "data: URL cannot be read"


def find_roots(path: Path, images: Sequence[str]) -> list[list[str]]:
    """Return the [prefix, folder] pairs in which image names are looked up, in this order.

    Args:
        path: file or folder of the rows. Without `images`, its folder and `images/` in it are searched.
        images: folders, or `prefix=folder` for names that begin with `prefix/` (`coco=/data/coco`). Where it names an
            existing folder, a word (or all words, joined by commas) is that folder, whatever its name contains.

    Raises:
        ValueError: a folder does not exist.
    """
    if not images:
        folder = path if path.is_dir() else path.parent
        return [["", str(folder)], ["", str(folder / "images")]]
    is_folder = lambda word: os.path.isdir(os.path.expanduser(word))
    roots = []
    for word in [whole] if is_folder(whole := ",".join(images)) else images:
        prefix, folder = ("", word) if "=" not in word or is_folder(word) else word.split("=", 1)
        folder = Path(folder).expanduser().absolute()
        if not folder.is_dir():
            raise ValueError(f"images={word}: {folder} is not a folder")
        roots.append([prefix.strip("/"), str(folder)])
    return roots


def list_images(row: dict) -> list:
    """Return the images under the key `images` or `image` of a row, as a list that may be empty."""
    value = row.get("images") if row.get("images") is not None else row.get("image")
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def find_image(value: object, roots: Sequence[Sequence[str]]) -> bytes | Path:
    """Return the path or the bytes of an image; the path may not exist (writing the shard then drops the record).

    Raises:
        Unusable: the value is empty, a web address, a broken data: URL, or a name that leaves its folder.
    """
    if isinstance(value, dict):  # as in `datasets` and parquet
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, (bytes, bytearray)) and value:
        return bytes(value)
    if value is None or value == "":
        raise Unusable(IMAGE_MISSING)
    if not isinstance(value, str):
        raise Unusable(NOT_A_NAME)
    if value.startswith("data:"):
        head, comma, data = value.partition(",")
        try:
            if not comma or not head.endswith(";base64"):
                raise ValueError
            return base64.b64decode(unquote(data), validate=True)
        except (ValueError, binascii.Error):
            raise Unusable(BAD_DATA_URL) from None
    if value.startswith("file://"):
        value = unquote(value.removeprefix("file://"))
    if "://" in value:
        raise Unusable(REMOTE)
    name = Path(value)
    if name.is_absolute():
        return name
    if ".." in name.parts:
        raise Unusable(OUTSIDE)
    places = []
    for prefix, folder in roots:
        if not prefix:
            places.append(Path(folder, name))
        elif value.startswith(prefix + "/"):
            places.append(Path(folder, value[len(prefix) + 1 :]))
    if not places:
        raise Unusable(IMAGE_MISSING)
    return next((place for place in places[:-1] if os.path.isfile(place)), places[-1]) if len(places) > 1 else places[0]


def name_images(values: Sequence[object]) -> dict:
    """Return `image_id` for `meta`: the data set's names of its images; {} if an image has no name."""
    names = [v.get("path") if isinstance(v, dict) else v for v in values]
    names = [name if isinstance(name, str) and not name.startswith("data:") else None for name in names]
    if not names or None in names:
        return {}
    return {"image_id": names[0] if len(names) == 1 else names}
