"""A validation split for data sets that have none: a share of the rows, chosen by their names."""

from __future__ import annotations

import hashlib


def held_out(name: str, share: float) -> bool:
    """Whether the row, or image, of this name is validation's. It depends on nothing else: not on order or number."""
    digest = hashlib.sha256(f"holdout\x1f{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_holdout(split: str, holdout: float) -> None:
    """Raises:
    ValueError: the share is none, or validation is wanted and nothing is held out for it.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} is the share of rows kept for val; it must be from 0 to below 1")
    if split == "val" and holdout == 0:
        raise ValueError("split=val is the share that holdout keeps back, and holdout=0; set holdout or splits=train")
