"""Which records `val=` holds out of train, and which images are then val's alone.

A record goes to one side as a whole, by one hash. Its other images may stand in records of the other side: those of
val are written first, and train leaves out what shares an image with them.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.recipes.record import Record

SHARED = "shares an image with val"
WIDTH = 8  # bytes by which an image is known


def hash_images(item: Record) -> list[bytes]:
    """SHA-256 of each image's name; a file counts as the same image by its last two names, bytes by their content."""
    names = ["/".join(i.parts[-2:]) if isinstance(i, Path) else hashlib.sha256(i).hexdigest() for i in item.images]
    return [hashlib.sha256(name.encode(errors="surrogatepass")).digest() for name in names]


def choose_side(item: Record, images: Sequence[bytes], val: float) -> str:
    """train or val, by one image of the record (by the id, for text): a share of `val`, however many images it has.

    Which image speaks for a record and what it says are read from different bytes of the hash, so that more images
    make neither side likelier; records of the same images go to the same side.
    """
    if images:
        word = min(images, key=lambda image: image[WIDTH:])
    else:
        word = hashlib.sha256(str(item.record.get("id") or item.key).encode(errors="surrogatepass")).digest()
    return "val" if int.from_bytes(word[:WIDTH], "big") / 2**64 < val else "train"


def write_held_out(path: Path, images: Iterable[str]) -> tuple[str, str]:
    """Write the images of val, given in hexadecimal as reports hold them; returns the file and its digest."""
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
    """The images of val, sorted; `digest` tells files of one name apart."""
    import numpy as np

    return np.fromfile(path, dtype="<u8")


def shares_image(images: Sequence[bytes], held_out: tuple[str, str]) -> bool:
    """Whether one of these images is val's."""
    import numpy as np

    known = load_held_out(*held_out)
    if not images or not len(known):
        return False
    wanted = np.frombuffer(b"".join(image[:WIDTH] for image in images), dtype=">u8").astype("<u8")
    places = np.searchsorted(known, wanted)
    return bool((known[np.minimum(places, len(known) - 1)] == wanted).any())
