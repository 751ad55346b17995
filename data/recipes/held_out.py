"""Choose the records that `val=` holds out of train, and keep their images out of train.

A hash assigns each record as a whole to train or val. Since records may share images across the two sides, val is
written first, and train drops every record that shares an image with it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.recipes.record import Record

SHARED = "shares an image with val"
WIDTH = 8  # leading bytes of an image's hash that identify it


def hash_images(item: Record) -> list[bytes]:
    """Return one SHA-256 per image: of the last two path components for a file, of the content for bytes."""
    names = ["/".join(i.parts[-2:]) if isinstance(i, Path) else hashlib.sha256(i).hexdigest() for i in item.images]
    return [hashlib.sha256(name.encode(errors="surrogatepass")).digest() for name in names]


def choose_side(item: Record, images: Sequence[bytes], val: float) -> str:
    """Return "train" or "val" from the hash of one image of the record (of its id, if it has no image).

    The probability of val is `val` for any number of images, because different bytes of the hashes choose the image and
    the side. Records with the same images go to the same side.
    """
    if images:
        word = min(images, key=lambda image: image[WIDTH:])
    else:
        word = hashlib.sha256(str(item.record.get("id") or item.key).encode(errors="surrogatepass")).digest()
    return "val" if int.from_bytes(word[:WIDTH], "big") / 2**64 < val else "train"


def write_held_out(path: Path, images: Iterable[str]) -> tuple[str, str]:
    """Write the hashes of val's images, given in hexadecimal as in the reports; return the file and its digest."""
    import numpy as np

    values = np.unique(np.frombuffer(bytes.fromhex("".join(images)), dtype=">u8").astype("<u8"))
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(values.tobytes())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return str(path), hashlib.sha256(values.tobytes()).hexdigest()


@functools.lru_cache(maxsize=1)
def load_held_out(path: str, digest: str):
    """Load the sorted hashes (uint64) of val's images; `digest` keeps the cache from serving an older file."""
    import numpy as np

    return np.fromfile(path, dtype="<u8")


def shares_image(images: Sequence[bytes], held_out: tuple[str, str]) -> bool:
    """Return whether one of these images is in val."""
    import numpy as np

    known = load_held_out(*held_out)
    if not images or not len(known):
        return False
    wanted = np.frombuffer(b"".join(image[:WIDTH] for image in images), dtype=">u8").astype("<u8")
    places = np.searchsorted(known, wanted)
    return bool((known[np.minimum(places, len(known) - 1)] == wanted).any())
