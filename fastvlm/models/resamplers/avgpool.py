"""Average pooling of the patch grid to a fixed number of visual tokens (MM1, arXiv 2403.09611, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, check_square, side_of


class AvgPoolResampler(nn.Module):
    """Adaptive average pooling of a square grid.

    Args:
        num_tokens: visual tokens per view, a square number, at most the number of patches.
        positions: add a learned position vector to each visual token, because pooling loses the position.

    Raises:
        ValueError: `num_tokens` is not a square or exceeds the number of patches, or these form no square grid.
    """

    def __init__(self, *, in_dim: int, num_tokens: int, positions: bool = True):
        super().__init__()
        self.side = check_square(num_tokens)
        self.num_tokens, self.out_dim = num_tokens, in_dim
        self.positions = nn.Parameter(torch.randn(num_tokens, in_dim) * 0.02) if positions else None

    def num_tokens_out(self, num_patches: int) -> int:
        side_of(num_patches)
        return check_at_most(self.num_tokens, num_patches)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D"]:
        self.num_tokens_out(patches.shape[1])
        grid = rearrange(patches, "i (h w) d -> i d h w", h=side_of(patches.shape[1]))
        tokens = rearrange(F.adaptive_avg_pool2d(grid, self.side), "i d h w -> i (h w) d")
        return tokens if self.positions is None else tokens + self.positions
