"""D-Abstractor: a resampler with deformable attention (Honeybee, arXiv 2312.06742, section 3.2).

The attention is that of Deformable DETR (arXiv 2010.04159, equation 2) on one feature level, in plain PyTorch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, check_square, side_of
from fastvlm.models.resamplers.positions import GridPositions


class DeformableAttention(nn.Module):
    """Attention of each head to `points` bilinearly sampled locations around a query's reference point."""

    def __init__(self, dim: int, *, heads: int, points: int):
        super().__init__()
        self.heads = heads
        self.offsets = nn.Linear(dim, heads * points * 2)
        self.weights = nn.Linear(dim, heads * points)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        # Initially head h looks in direction h, with its p-th point p patches away.
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = repeat(directions, "heads xy -> heads p xy", p=points) * torch.arange(1, points + 1)[:, None]
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(steps.flatten())

    def forward(
        self, queries: Float[Tensor, "I M D"], references: Float[Tensor, "M 2"], patches: Float[Tensor, "I N D"]
    ) -> Float[Tensor, "I M D"]:
        """Attend from the queries to the patches; `references` are (x, y) in [0, 1] of the map."""
        side = side_of(patches.shape[1])
        value = rearrange(self.value(patches), "i (h w) (heads d) -> (i heads) d h w", h=side, heads=self.heads)
        offsets = rearrange(self.offsets(queries), "i m (heads p xy) -> (i heads) m p xy", heads=self.heads, xy=2)
        weights = rearrange(self.weights(queries), "i m (heads p) -> (i heads) 1 m p", heads=self.heads).softmax(-1)
        places = references[:, None] + offsets / side  # (I heads, M, P, 2)
        # In half precision the locations would be off by more than a patch.
        exact = torch.promote_types(places.dtype, torch.float32)
        sampled = F.grid_sample(value.to(exact), 2 * places.to(exact) - 1, align_corners=False)  # (I heads, d, M, P)
        read = reduce(sampled * weights, "ih d m p -> ih d m", "sum").to(patches.dtype)
        return self.out(rearrange(read, "(i heads) d m -> i m (heads d)", heads=self.heads))


class DeformableBlock(nn.Module):
    """Self-attention of the queries, deformable attention to the map and feed-forward, each residual with post-norm."""

    def __init__(self, dim: int, *, heads: int, points: int, hidden: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.deformable = DeformableAttention(dim, heads=heads, points=points)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm_attention, self.norm_deformable, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, tokens: Tensor, where: Tensor, references: Tensor, patches: Tensor) -> Tensor:
        placed = tokens + where
        tokens = self.norm_attention(tokens + self.attention(placed, placed, tokens, need_weights=False)[0])
        tokens = self.norm_deformable(tokens + self.deformable(tokens + where, references, patches))
        return self.norm_mlp(tokens + self.mlp(tokens))


class DAbstractorResampler(nn.Module):
    """Learned tokens that read the map by deformable attention around learned reference points.

    Args:
        num_tokens: visual tokens per view, a square number, at most the number of patches. Honeybee: 144.
        dim: width of the blocks and of the visual tokens; None: the encoder's. Honeybee: 1024.
        depth: number of blocks.
        heads: heads of both attentions; must divide the width.
        points: locations each head samples.
        mlp_ratio: hidden width of the feed-forward relative to `dim`.
        positions: side of the grid of learned positions added to the patches, interpolated for other grids; 0: none.

    Raises:
        ValueError: `num_tokens` is not a square or exceeds the number of patches, the patches form no square grid, or
            `heads` does not divide the width.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        num_tokens: int,
        dim: int | None = None,
        depth: int = 6,
        heads: int = 8,
        points: int = 4,
        mlp_ratio: float = 1.0,
        positions: int = 24,
    ):
        super().__init__()
        self.side, dim = check_square(num_tokens), in_dim if dim is None else dim
        if dim % heads:
            raise ValueError(f"resampler.heads={heads} does not divide the width {dim}; change heads or resampler.dim")
        self.num_tokens, self.out_dim = num_tokens, dim
        self.project = nn.Identity() if dim == in_dim else nn.Linear(in_dim, dim)
        self.positions = GridPositions(positions, dim) if positions else None
        self.tokens = nn.Parameter(torch.randn(1, num_tokens, dim) * 0.02)
        edge = 0.5 / (positions or self.side)  # the centre of the first patch
        line = torch.linspace(edge, 1 - edge, self.side)
        y, x = torch.meshgrid(line, line, indexing="ij")
        # One-dimensional, so that neither weight decay nor Muon is applied to the reference points.
        self.references = nn.Parameter(torch.stack([x, y], dim=-1).flatten())
        options = dict(heads=heads, points=points, hidden=int(dim * mlp_ratio))
        self.blocks = nn.ModuleList(DeformableBlock(dim, **options) for _ in range(depth))

    def num_tokens_out(self, num_patches: int) -> int:
        side_of(num_patches)
        return check_at_most(self.num_tokens, num_patches)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D_out"]:
        self.num_tokens_out(patches.shape[1])
        patches = self.project(patches)
        if self.positions is not None:
            patches = self.positions(patches)
        grid = rearrange(patches, "i (h w) d -> i d h w", h=side_of(patches.shape[1]))
        # The pooled map serves as the queries' position embedding, as in Honeybee's released configuration.
        where = rearrange(F.adaptive_avg_pool2d(grid, self.side), "i d h w -> i (h w) d")
        references = rearrange(self.references, "(m xy) -> m xy", xy=2)
        tokens = self.tokens.expand(patches.shape[0], -1, -1)
        for block in self.blocks:
            tokens = block(tokens, where, references, patches)
        return tokens
