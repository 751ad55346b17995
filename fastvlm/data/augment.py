"""Augmentation of training images: what is drawn depends on a seed alone, so a resumed run draws the same.

A stage says how strong (`image.augment`), a source what its questions allow (`Source(augment=...)`): a mirror swaps
left and right and spoils text, a crop loses what is counted or read. Only brightness, contrast and saturation change no
word of most answers, so that is what a source allows unless it says more. Hue is never changed: colours are asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

KINDS = ("crop", "jitter", "mirror")
STRETCH = 4 / 3  # of a crop's aspect, at most, as in Inception's random resized crop
ONE = 1 << 16  # fixed point: integers give the same pixels on every machine


def check_kinds(kinds: Iterable[str], *, key: str) -> tuple[str, ...]:
    """Names of KINDS, in their order.

    Raises:
        ValueError: another name.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}: {kind} is none of {', '.join(KINDS)}{hint}")
    return tuple(kind for kind in KINDS if kind in kinds)


@dataclass(frozen=True)
class Draw:
    """What happens to one image."""

    area: float  # of the crop, share of the image
    stretch: float  # of the crop's aspect: width over height against the image's
    x: float  # where the crop lies, 0 left to 1 right
    y: float
    gains: tuple[float, float, float] | None  # brightness, contrast, saturation; 1 leaves as it is
    mirrored: bool

    def crop(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in an image of this size, pixels."""
        w = min(width, max(1, round(width * math.sqrt(self.area * self.stretch))))
        h = min(height, max(1, round(height * math.sqrt(self.area / self.stretch))))
        left, top = int(self.x * (width - w)), int(self.y * (height - h))
        return left, top, left + w, top + h


class Augmentation:
    """Random resized crop, colour jitter and mirror.

    Args:
        crop: smallest and largest share of the image's area that is kept, such as (0.8, 1.0); its aspect is stretched
            by up to 4/3. None for no crop.
        jitter: brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter.
        mirror: every other image is mirrored left to right.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, *, crop: Sequence[float] | None = None, jitter: float = 0.0, mirror: bool = False):
        if crop is not None and not (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1):
            raise ValueError(
                f"image.augment.crop={list(crop)} must be the smallest and the largest share of the area, above 0 and "
                "up to 1, such as [0.8, 1.0]"
            )
        if not 0 <= jitter <= 1:
            raise ValueError(f"image.augment.jitter={jitter} must be from 0 (none) to 1")
        self.crop = None if crop is None else (float(crop[0]), float(crop[1]))
        self.jitter, self.mirror = float(jitter), bool(mirror)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(k for k, on in zip(KINDS, (self.crop is not None, self.jitter > 0, self.mirror)) if on)

    def restricted(self, kinds: Iterable[str]) -> Augmentation:
        """The same, without what is not among `kinds`."""
        kinds = set(kinds)
        return Augmentation(
            crop=self.crop if "crop" in kinds else None,
            jitter=self.jitter if "jitter" in kinds else 0.0,
            mirror=self.mirror and "mirror" in kinds,
        )

    def draw(self, seed: str | int) -> Draw:
        """Every number has its own place in the seed's digest: without one kind the others stay as they were."""
        digest = hashlib.sha256(str(seed).encode()).digest()
        u = [int.from_bytes(digest[i : i + 4], "little") / 2**32 for i in range(0, 32, 4)]
        area, stretch = 1.0, 1.0
        if self.crop is not None:
            area = self.crop[0] + u[0] * (self.crop[1] - self.crop[0])
            stretch = 1 + (STRETCH - 1) * abs(2 * u[1] - 1)
            stretch = stretch if u[1] < 0.5 else 1 / stretch
        gains = tuple(1 + self.jitter * (2 * v - 1) for v in u[4:7]) if self.jitter else None
        return Draw(area, stretch, u[2], u[3], gains, self.mirror and u[7] < 0.5)


def grey_of(pixels: Tensor) -> Tensor:
    """Luma (ITU-R 601) of int32 (3, h, w): (h, w)."""
    return (77 * pixels[0] + 150 * pixels[1] + 29 * pixels[2] + 128) >> 8


def mean_grey(pixels: UInt8[Tensor, "3 h w"]) -> int:
    grey = grey_of(pixels.int())
    return int(grey.sum()) // grey.numel()


def jitter_colours(
    pixels: UInt8[Tensor, "3 h w"], gains: tuple[float, float, float], *, mean: int
) -> UInt8[Tensor, "3 h w"]:
    """Saturation about each pixel's grey, contrast about the image's mean grey, then brightness, in one step."""
    brightness, contrast, saturation = gains
    own = round(ONE * brightness * contrast * saturation)
    grey = round(ONE * brightness * contrast * (1 - saturation))
    constant = round(ONE * brightness * (1 - contrast)) * mean + ONE // 2
    pixels = pixels.int()
    return ((own * pixels + (grey * grey_of(pixels) + constant)) >> 16).clamp_(0, 255).to(torch.uint8)
