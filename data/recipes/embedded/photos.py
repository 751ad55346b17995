"""Crops of scikit-learn's two photographs, described by their position.

The positions of objects were marked by hand, in pixels of the 640 x 427 originals. The left part of each photograph is
for training, the upper right for validation, the lower right for testing; a crop never leaves its region.
"""

from __future__ import annotations

import functools
from random import Random

import numpy as np

from data.recipes.embedded.world import SIZE

PHOTOS = ("china", "flower")
REGIONS = {  # x0, y0, x1, y1
    "china": {"train": (0, 0, 205, 427), "val": (205, 0, 420, 212), "test": (205, 212, 420, 427)},
    "flower": {"train": (0, 0, 310, 427), "val": (310, 0, 600, 212), "test": (310, 212, 600, 427)},
}
BLOOMS = ((305, 220, 136), (375, 430, 78))  # centre and radius; the second centre is below the image


@functools.cache
def load_photo(name: str) -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return load_sample_image(f"{name}.jpg")


def choose_crop(name: str, split: str, rng: Random) -> tuple[int, int, int]:
    """Draw a square inside the split's region; return (x, y, side) in pixels."""
    x0, y0, x1, y1 = REGIONS[name][split]
    side = rng.randint(120, 200)
    return rng.randint(x0, x1 - side), rng.randint(y0, y1 - side), side


def describe_crop(name: str, crop: tuple[int, int, int]) -> str:
    """Return a description of the crop that follows from its position."""
    x, y, side = crop
    if name == "china":
        # The tower's roofs and walls fill x 65..350 below y 75; sky is above them, a lake to their right.
        text = "a photograph of a temple in china."
        if y < 45:
            text += " the sky above."
        if y + side > 375:
            text += " green trees below."
        return text
    xs, ys = np.meshgrid(np.arange(x, x + side, 4), np.arange(y, y + side, 4))
    share = float(np.mean(np.any([(xs - a) ** 2 + (ys - b) ** 2 < r**2 for a, b, r in BLOOMS], axis=0)))
    if share > 0.9:
        return "a photograph of orange petals, very near."
    if share > 0.02:
        return "a photograph of an orange flower. dark green leaves behind."
    return "a photograph of dark green leaves."


def render_crop(name: str, crop: tuple[int, int, int]) -> np.ndarray:
    """Return the crop resized to uint8 (96, 96, 3)."""
    from PIL import Image

    x, y, side = crop
    patch = Image.fromarray(load_photo(name)[y : y + side, x : x + side])
    return np.asarray(patch.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
