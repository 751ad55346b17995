"""One-line errors that list the weights that do not fit a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

LISTED = 5


def refuse_misfits(told: dict[str, Any], what: str) -> None:
    """Raise ValueError listing missing and mismatched weights.

    Args:
        told: the report of `from_pretrained(output_loading_info=True)`.
        what: the checkpoint's name in the message.
    """
    wrong = [f"{name} {tuple(there)} is {tuple(here)} here" for name, there, here in told.get("mismatched_keys", ())]
    refuse(wrong + [f"{name} is missing" for name in sorted(told.get("missing_keys", ()))], what)


def refuse_state(model: nn.Module, state: dict[str, Tensor], *, what: str) -> None:
    """Raise ValueError listing the differences unless `state` has exactly the model's names and shapes."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in state.items()}
    wrong = [f"{k} {there[k]} is {own[k]} here" for k in there if k in own and there[k] != own[k]]
    wrong += [f"{k} is missing" for k in own if k not in there]
    refuse(wrong + [f"{k} is not in this model" for k in there if k not in own], what)


def refuse(wrong: list[str], what: str) -> None:
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ValueError(f"{what}: {len(wrong)} weights do not fit its config.json: {'; '.join(wrong[:LISTED])}{more}")
