"""Learned 2D position embeddings, for resamplers that would otherwise lose where a patch was."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import side_of


class GridPositions(nn.Module):
    """Adds a learned vector to every patch, interpolated if the grid has another side.

    Args:
        side: side of the square grid of learned vectors.
        dim: width of a patch.

    Raises:
        ValueError: (forward) the patches form no square grid.
    """

    def __init__(self, side: int, dim: int):
        super().__init__()
        self.grid = nn.Parameter(torch.empty(side, side, dim))
        nn.init.trunc_normal_(self.grid, std=0.02)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I N D"]:
        old, new = self.grid.shape[0], side_of(patches.shape[1])
        grid = self.grid
        if new != old:
            weights = linear_weights(old, new).to(grid)
            grid = einsum(weights, weights, grid, "y i, x j, i j d -> y x d")
        return patches + rearrange(grid, "y x d -> (y x) d").to(patches.dtype)


def linear_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """Return the matrix of antialiased linear interpolation; its product has a deterministic gradient everywhere."""
    # Interpolated as one map, because torch 2.15 on the CPU interpolates maps of width 1 wrongly.
    cells = torch.eye(old).view(1, 1, old, old)
    return F.interpolate(cells, size=(new, old), mode="bilinear", antialias=True)[0, 0]
