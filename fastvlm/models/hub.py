"""Load pretrained weights, with one-line errors where they are missing or do not fit."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

T = TypeVar("T")
LISTED = 8  # tensors named in a message


def fetch(build: Callable[[], T], *, what: str, mend: str) -> T:
    """Return `build()`, which may access the hub.

    Raises:
        ValueError: `build` failed; the message has `what` (the key and its value) and `mend` (what to do instead).
    """
    # The libraries log what they also raise, and the hub client logs every retry.
    logging.disable(logging.ERROR)
    try:
        return build()
    except Exception as error:  # the libraries raise many unrelated classes: offline, unknown name, unreadable file
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(f"{what}: {why}; {mend}") from None
    finally:
        logging.disable(logging.NOTSET)


def refuse_differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], *, what: str, mend: str) -> None:
    """Check that a checkpoint has every wanted tensor in the wanted shape.

    Raises:
        ValueError: tensors are missing or of another shape; the message lists them.
    """
    wrong = [
        f"{key} is {tuple(found[key].shape)} there and {tuple(value.shape)} here"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    missing = [key for key in wanted if key not in found]
    if wrong:
        raise ValueError(f"{what}: {len(wrong)} tensors of other shapes: {listed(wrong)}; {mend}")
    if missing:
        raise ValueError(f"{what} lacks {len(missing)} of {len(wanted)} tensors: {listed(missing)}; {mend}")


def refuse_incomplete(info: Mapping[str, Iterable], kept: Collection[str], *, what: str) -> None:
    """Raise on missing or mismatched tensors, about which transformers' `from_pretrained` only warns.

    Args:
        info: the report of `from_pretrained(output_loading_info=True)`.
        kept: names of the tensors that are used; others may be missing.

    Raises:
        ValueError: the checkpoint lacks tensors of `kept` or has them in another shape; the message lists them.
    """
    wrong = [f"{key} is {tuple(a)} there and {tuple(b)} here" for key, a, b in info["mismatched_keys"] if key in kept]
    if wrong:
        mend = "its config.json is not that of its weights"
        raise ValueError(f"{what}: {len(wrong)} tensors of other shapes: {listed(sorted(wrong))}; {mend}")
    if missing := sorted(key for key in info["missing_keys"] if key in kept):
        raise ValueError(
            f"{what} lacks {len(missing)} of {len(kept)} tensors: {listed(missing)}; they would be random: name a "
            "whole checkpoint of this model type"
        )


def known_config(model_type: str, config: Mapping[str, Any], *, key: str, **more: Any) -> PreTrainedConfig:
    """Return the configuration of a model type with these arguments.

    Raises:
        ValueError: the type or an argument is unknown (transformers would silently ignore a misspelt one), or the
            configuration rejects the values.
    """
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise ValueError(f"{key}.model_type={model_type} is not a model type transformers knows") from None
    for name in config:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, vars(known), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}.{name} is not an argument of {type(known).__name__}{hint}")
    try:
        return AutoConfig.for_model(model_type, **more, **config)
    except Exception as error:  # noqa: BLE001  its validators raise their own classes, with messages of several lines
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{key}: {model_type} refuses these sizes: {why}") from None


def listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
