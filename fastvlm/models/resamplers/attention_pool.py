"""Attention pooling: one cross-attention (MM1, arXiv 2403.09611, section 3.1; CoCa, arXiv 2205.01917)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, check_positive


class AttentionPoolResampler(nn.Module):
    """One cross-attention from `num_tokens` learned queries to the patches, both normalised first.

    Args:
        num_tokens: visual tokens per view, at most the number of patches.
        dim: width of the visual tokens; None: the encoder's.
        heads: attention heads; must divide the width.

    Raises:
        ValueError: `heads` does not divide the width, or `num_tokens` is below 1 or exceeds the number of patches.
    """

    def __init__(self, *, in_dim: int, num_tokens: int, dim: int | None = None, heads: int = 8):
        super().__init__()
        dim = in_dim if dim is None else dim
        if dim % heads:
            raise ValueError(f"resampler.heads={heads} does not divide the width {dim}; change heads or resampler.dim")
        self.num_tokens, self.out_dim = check_positive(num_tokens), dim
        self.queries = nn.Parameter(torch.randn(1, num_tokens, dim))
        self.norm_queries, self.norm_patches = nn.LayerNorm(dim), nn.LayerNorm(in_dim)
        self.attention = nn.MultiheadAttention(dim, heads, kdim=in_dim, vdim=in_dim, batch_first=True)

    def num_tokens_out(self, num_patches: int) -> int:
        return check_at_most(self.num_tokens, num_patches)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D_out"]:
        self.num_tokens_out(patches.shape[1])
        queries = self.norm_queries(self.queries).expand(patches.shape[0], -1, -1)
        context = self.norm_patches(patches)
        return self.attention(queries, context, context, need_weights=False)[0]
