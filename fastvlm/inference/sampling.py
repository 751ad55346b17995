"""Sampling the next token from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Temperatures are clamped to this range so that logits / temperature does not overflow or underflow in float32. Below
# it only the most probable token remains anyway; above it all tokens are equally probable to the last digit.
COLDEST, HOTTEST = 1e-30, 1e30


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy.
        top_k: sample from the k most probable tokens; 0 uses all.
        top_p: sample from the smallest set of most probable tokens whose total probability reaches this; 0 is greedy.

    Raises:
        ValueError: a value is out of range or not finite.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            said = "negative" if self.temperature < 0 else "no number to divide by"
            raise ValueError(f"temperature={self.temperature} is {said}; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; 0 keeps every token")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in [0, 1]; 1 keeps every token")


def keep_probable(logits: Float[Tensor, "B V"], *, top_k: int = 0, top_p: float = 1.0) -> Float[Tensor, "B V"]:
    """Return logits with -inf for all tokens outside the top k, and outside the nucleus of probability top_p.

    The nucleus is the smallest set of most probable tokens whose total probability reaches top_p (Holtzman et al. 2020,
    section 3.1), computed after top_k; the most probable token always stays. top_k=0 and top_p=1 keep everything.

    Raises:
        ValueError: top_k is negative or top_p is not in [0, 1].
    """
    if top_k < 0:
        raise ValueError(f"top_k={top_k} is negative; 0 keeps every token")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in [0, 1]; 1 keeps every token")
    if 0 < top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        # By index, not by threshold: with ties at the border, exactly k stay.
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the mass of the more probable tokens
        beyond[..., 0] = False  # 0, to which float32 may also round top_p, would remove every token
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def probabilities_of(
    logits: Float[Tensor, "B V"], *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "B V"]:
    """Return the distribution `choose_tokens` draws from at temperatures above 0; filters apply after the temperature.

    The largest logit of each row is subtracted first, which changes no probability and prevents overflow.
    """
    logits = logits.float()
    below = logits - logits.amax(dim=-1, keepdim=True)
    return keep_probable(below / min(max(temperature, COLDEST), HOTTEST), top_k=top_k, top_p=top_p).softmax(dim=-1)


def choose_tokens(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator] = (),
) -> Int[Tensor, "B"]:
    """Choose the next token of every row: the argmax at temperature 0, else a draw from the row's own generator.

    Filters apply in the order of `transformers`: temperature, top_k, top_p.

    Raises:
        ValueError: the temperature is negative; see also `keep_probable`.
        FloatingPointError: a row to sample from has NaN or infinite logits; no token has been drawn for any row.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative; 0 is greedy")
    if temperature == 0:  # no filter removes the most probable token
        return logits.argmax(dim=-1)
    probabilities = probabilities_of(logits, temperature=temperature, top_k=top_k, top_p=top_p).cpu()
    if probabilities[:, 0].isnan().any():  # softmax makes the whole row NaN
        raise FloatingPointError("the model's logits are not finite: no token can be drawn")
    # Drawn on the CPU, row by row: a seed gives the same answer on any device and beside any other rows.
    draws = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators)]
    return torch.cat(draws).to(logits.device)
