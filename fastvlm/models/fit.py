"""Check that the four parts of a model fit each other, before anything runs."""

from __future__ import annotations

from torch import nn


def check_fit(encoder: nn.Module, resampler: nn.Module, projector: nn.Module, llm: nn.Module) -> None:
    """Check that neighbouring widths agree and that a resampler can take an encoder's empty slots.

    Raises:
        ValueError: they do not; the message names both parts and the key to change.
    """
    for (left, yields), (right, takes) in (
        (("encoder", encoder), ("resampler", resampler)),
        (("resampler", resampler), ("projector", projector)),
    ):
        if (width := getattr(takes, "in_dim", None)) not in (None, yields.out_dim):
            raise ValueError(
                f"{left} yields a width of {yields.out_dim}, but {right} takes {width}: leave {right}.in_dim out, it "
                f"is handed on, or set it to {yields.out_dim}"
            )
    if (width := getattr(projector, "out_dim", None)) not in (None, llm.dim):
        raise ValueError(
            f"projector yields tokens of width {width}, but llm takes {llm.dim}: leave projector.out_dim out, it is "
            f"handed on, or set it to {llm.dim}"
        )
    if getattr(encoder, "drops_tokens", False) and not getattr(resampler, "keeps_empty", False):
        raise ValueError(
            f"the encoder's exits have {encoder.tokens} tokens and its end more, but {type(resampler).__name__} cannot "
            "leave slots empty: set encoder.num_tokens=null, or resampler=identity"
        )
