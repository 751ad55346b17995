"""Checks of `num_tokens`, which in every resampler is the number of visual tokens per view."""

from __future__ import annotations

import math
from collections.abc import Callable


def side_of(num_patches: int) -> int:
    """Return the side of the square grid that the patches form; encoders take square images.

    Raises:
        ValueError: the patches form no square grid.
    """
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        token = "; without its class token it does: encoder.class_token=false" if is_square(num_patches - 1) else ""
        raise ValueError(f"the encoder yields {num_patches} patches, no square grid; use resampler=perceiver{token}")
    return side


def is_square(number: int) -> bool:
    return math.isqrt(max(number, 0)) ** 2 == number


def check_square(num_tokens: int) -> int:
    """Return the side of the square grid of visual tokens.

    Raises:
        ValueError: `num_tokens` is not a square number.
    """
    side = math.isqrt(max(num_tokens, 0))
    if num_tokens < 1 or side**2 != num_tokens:
        fits = nearest(num_tokens, lambda n: math.isqrt(n) ** 2 == n)
        raise ValueError(f"resampler.num_tokens={num_tokens} is not a square number; the nearest: {fits}")
    return side


def check_at_most(num_tokens: int, num_patches: int) -> int:
    """Return `num_tokens` if there are at least as many patches.

    Raises:
        ValueError: there are fewer.
    """
    if num_patches < num_tokens:
        raise ValueError(
            f"resampler.num_tokens={num_tokens} is more than the {num_patches} patches of an image; "
            "raise the stage's image_size or lower resampler.num_tokens"
        )
    return num_tokens


def check_positive(num_tokens: int) -> int:
    """Return `num_tokens` if it is at least 1.

    Raises:
        ValueError: it is below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"resampler.num_tokens={num_tokens} must be at least 1")
    return num_tokens


def nearest(num_tokens: int, fits: Callable[[int], bool], *, up_to: int | None = None) -> str:
    """Return the nearest fitting numbers below and above `num_tokens`, such as "36 and 49", for messages."""
    last = 4 * max(num_tokens, 1) if up_to is None else up_to
    below = next((n for n in range(min(num_tokens - 1, last), 0, -1) if fits(n)), None)
    above = next((n for n in range(max(num_tokens, 0) + 1, last + 1) if fits(n)), None)
    return " and ".join(str(n) for n in (below, above) if n is not None) or "none"
