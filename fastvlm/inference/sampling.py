"""From the logits of the next token to the token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Beyond these float32 has no room for a logit over the temperature. Nearer to 0 only the most probable token is left
# anyway, further up all are as probable to the last digit.
COLDEST, HOTTEST = 1e-30, 1e30


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy.
        top_k: sample among the k most probable tokens; 0 among all.
        top_p: sample among the most probable tokens that together reach this probability.

    Raises:
        ValueError: one of them is out of range or no number.
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
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 keeps every token")


def keep_probable(logits: Float[Tensor, "B V"], *, top_k: int = 0, top_p: float = 1.0) -> Float[Tensor, "B V"]:
    """Logits with -inf on all but the k most probable tokens, and on all beyond the nucleus of mass p.

    The nucleus is the smallest set of most probable tokens whose probability reaches top_p (Holtzman et al. 2020,
    section 3.1), among what top_k left; the most probable token always stays. top_k = 0 and top_p = 1 keep everything.

    Raises:
        ValueError: top_k is negative or top_p is not in (0, 1].
    """
    if top_k < 0:
        raise ValueError(f"top_k={top_k} is negative; 0 keeps every token")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]; 1 keeps every token")
    if 0 < top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        # By index, not by threshold: of equal logits at the border exactly k stay.
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the mass of the more probable tokens
        beyond[..., 0] = False  # a top_p that float32 rounds to 0 is reached by nothing
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def probabilities_of(
    logits: Float[Tensor, "B V"], *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "B V"]:
    """What `choose_tokens` draws from at a temperature above 0: the nucleus is that of the logits so divided.

    Of each row its largest logit is taken off before, which changes no probability and lets no quotient overflow.
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
    """The next token of every row: the most probable one at temperature 0, else a draw from the row's own generator.

    The order is that of `transformers`: temperature, then the k most probable, then the nucleus of what is left.

    Raises:
        ValueError: a negative temperature, or see `keep_probable`.
        FloatingPointError: the logits of a row to draw for hold NaN or infinity; nothing has been drawn.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative; 0 is greedy")
    if temperature == 0:  # no filter takes the most probable token out
        return logits.argmax(dim=-1)
    probabilities = probabilities_of(logits, temperature=temperature, top_k=top_k, top_p=top_p).cpu()
    if probabilities[:, 0].isnan().any():  # then all of the row are
        raise FloatingPointError("the model's logits are not finite: no token can be drawn")
    # Draws are made on the CPU, row by row: the same seed gives the same answer whatever the device and the neighbours.
    draws = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators)]
    return torch.cat(draws).to(logits.device)
