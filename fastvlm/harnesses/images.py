"""The images a harness hands over, as our own evaluation would read them from their files."""

from __future__ import annotations

import io

from PIL import Image

from fastvlm.data.decode import read_orientation, to_rgb

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_bytes(image: Image.Image | str) -> bytes:
    """An opened image as a file without loss: on white where transparent, upright; a path's own bytes."""
    if isinstance(image, str):
        with open(image, "rb") as file:
            return file.read()
    orientation = read_orientation(image)
    pixels = to_rgb(image)
    stored = io.BytesIO()
    (pixels.transpose(UPRIGHT[orientation]) if orientation > 1 else pixels).save(stored, "BMP")
    return stored.getvalue()
