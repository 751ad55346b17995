"""Convert images from a harness so that they are read like files in our own evaluation."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from fastvlm.data.decode import read_orientation, to_rgb


def to_bytes(image: Image.Image | str) -> bytes:
    """Encode an image losslessly, upright and with transparency on white; for a path, return the file's bytes."""
    if isinstance(image, str):
        with open(image, "rb") as file:
            return file.read()
    upright = ImageOps.exif_transpose(image) if read_orientation(image) > 1 else image
    stored = io.BytesIO()
    to_rgb(upright).save(stored, "BMP")
    return stored.getvalue()
