"""Adaptive average pooling to a rectangle of visual tokens, without parameters.

It equals Gemma 3's pooling where the side of the grid of tokens divides that of the patches.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, nearest, side_of


class AdaptivePoolResampler(nn.Module):
    """Average pooling to the rows x columns closest to a square that give `num_tokens` cells.

    For a square number this is `resampler=avgpool` without its learned positions; 32, 72 or 162 work as well.

    Args:
        num_tokens: rows x columns with columns at most twice the rows, because longer cells would be strips.

    Raises:
        ValueError: `num_tokens` has no such rectangle, it does not fit in the grid of patches, or that grid is not
            square.
    """

    def __init__(self, *, in_dim: int, num_tokens: int):
        super().__init__()
        self.num_tokens, self.out_dim = num_tokens, in_dim
        if not fits(num_tokens):
            raise ValueError(
                f"resampler.num_tokens={num_tokens} is not a rectangle of rows x columns with columns at most "
                f"twice the rows; the nearest: {nearest(num_tokens, fits)}"
            )
        self.rows, self.columns = rectangle(num_tokens)

    def num_tokens_out(self, num_patches: int) -> int:
        side = side_of(num_patches)
        check_at_most(self.num_tokens, num_patches)
        if self.columns > side:
            inside = nearest(self.num_tokens, lambda n: fits(n) and rectangle(n)[1] <= side, up_to=num_patches)
            raise ValueError(
                f"resampler.num_tokens={self.num_tokens} is {self.rows} x {self.columns} cells, but an image has "
                f"{side} x {side} patches; the nearest: {inside}"
            )
        return self.num_tokens

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D"]:
        self.num_tokens_out(patches.shape[1])
        grid = rearrange(patches, "i (h w) d -> i d h w", h=side_of(patches.shape[1]))
        return rearrange(F.adaptive_avg_pool2d(grid, (self.rows, self.columns)), "i d h w -> i (h w) d")


def rectangle(num_tokens: int) -> tuple[int, int]:
    """Return (rows, columns), rows <= columns, as close to a square as the divisors allow."""
    rows = next(r for r in range(math.isqrt(num_tokens), 0, -1) if num_tokens % r == 0)
    return rows, num_tokens // rows


def fits(num_tokens: int) -> bool:
    return num_tokens >= 1 and rectangle(num_tokens)[1] <= 2 * rectangle(num_tokens)[0]
