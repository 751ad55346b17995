"""The images a harness hands over, as our own evaluation would read them from their files."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from fastvlm.data.decode import read_orientation, to_rgb


def to_bytes(image: Image.Image | str) -> bytes:
    """An opened image as a file without loss: on white where transparent, upright; a path's own bytes."""
    if isinstance(image, str):
        with open(image, "rb") as file:
            return file.read()
    upright = ImageOps.exif_transpose(image) if read_orientation(image) > 1 else image
    stored = io.BytesIO()
    to_rgb(upright).save(stored, "BMP")
    return stored.getvalue()
