"""Pretrained weights by name, with one plain line when there are none to be had."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def fetch(build: Callable[[], T], *, what: str, mend: str) -> T:
    """`build()`, which may read the hub.

    Raises:
        ValueError: `what` (the key and its value) could not be built; `mend` says what to do instead.
    """
    # Libraries log what they also raise, and the hub's client every retry.
    logging.disable(logging.ERROR)
    try:
        return build()
    except Exception as error:  # offline, unknown, unreadable: the libraries raise a dozen unrelated classes for these
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(f"{what}: {why}; {mend}") from None
    finally:
        logging.disable(logging.NOTSET)
