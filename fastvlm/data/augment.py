"""Augmentation of training images, drawn from a seed alone, so that a resumed run draws the same.

A stage sets the strength (`image.augment`), a source the kinds that its questions allow (`Source(augment=...)`): a
mirror swaps left and right and spoils text, a crop loses what is counted or read. Changing brightness, contrast and
saturation keeps most answers true, so a source allows only that (`jitter`) by default. Hue is never changed, because
questions ask for colours.
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
STRETCH = 4 / 3  # maximum change of a crop's aspect ratio, as in Inception's random resized crop
ONE = 1 << 16  # 1.0 in fixed point: integers give the same pixels on every machine


def check_kinds(kinds: Iterable[str], *, key: str) -> tuple[str, ...]:
    """Return names of KINDS, in the order of KINDS.

    Raises:
        ValueError: an unknown name; the message begins with `key`.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}: {kind} is not one of {', '.join(KINDS)}{hint}")
    return tuple(kind for kind in KINDS if kind in kinds)


@dataclass(frozen=True)
class Draw:
    """The random changes to one image."""

    area: float  # of the crop, as a share of the image
    stretch: float  # aspect ratio (width over height) of the crop, relative to the image's
    x: float  # position of the crop, 0 left to 1 right
    y: float  # 0 top to 1 bottom
    gains: tuple[float, float, float] | None  # brightness, contrast, saturation; 1: unchanged
    mirrored: bool

    def crop(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the crop (left, top, right, bottom) of an image of this size, in pixels."""
        w = min(width, max(1, round(width * math.sqrt(self.area * self.stretch))))
        h = min(height, max(1, round(height * math.sqrt(self.area / self.stretch))))
        left, top = int(self.x * (width - w)), int(self.y * (height - h))
        return left, top, left + w, top + h


class Augmentation:
    """Random resized crop, colour jitter and mirror.

    Args:
        crop: smallest and largest share of the image's area to keep, such as (0.8, 1.0); the aspect ratio changes by up
            to 4/3. None: no crop.
        jitter: brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter; 0: no jitter.
        mirror: mirror an image left to right with probability 1/2.

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
        """Return the same augmentation with only these kinds."""
        kinds = set(kinds)
        return Augmentation(
            crop=self.crop if "crop" in kinds else None,
            jitter=self.jitter if "jitter" in kinds else 0.0,
            mirror=self.mirror and "mirror" in kinds,
        )

    def draw(self, seed: str | int) -> Draw:
        """Draw the changes to one image.

        Every number has a fixed place in the seed's digest: switching off one kind does not change the others.
        """
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
    """Return the luma (ITU-R 601) of int32 (3, h, w) as (h, w)."""
    return (77 * pixels[0] + 150 * pixels[1] + 29 * pixels[2] + 128) >> 8


def mean_grey(pixels: UInt8[Tensor, "3 h w"]) -> int:
    grey = grey_of(pixels.int())
    return int(grey.sum()) // grey.numel()


def jitter_colours(
    pixels: UInt8[Tensor, "3 h w"], gains: tuple[float, float, float], *, mean: int
) -> UInt8[Tensor, "3 h w"]:
    """Scale saturation around each pixel's grey, contrast around the image's mean grey, and brightness, in one step."""
    brightness, contrast, saturation = gains
    own = round(ONE * brightness * contrast * saturation)
    grey = round(ONE * brightness * contrast * (1 - saturation))
    constant = round(ONE * brightness * (1 - contrast)) * mean + ONE // 2
    pixels = pixels.int()
    return ((own * pixels + (grey * grey_of(pixels) + constant)) >> 16).clamp_(0, 255).to(torch.uint8)
