"""The Perceiver resampler of Flamingo (arXiv 2204.14198, section 2.1): learned queries attend to the patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, check_positive


class CrossAttentionBlock(nn.Module):
    """Attention of queries to patches and queries, then a feed-forward; both pre-norm and residual."""

    def __init__(self, dim: int, *, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.norm_queries, self.norm_patches, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        normed = self.norm_queries(queries)
        # Flamingo, section 2.1: keys and values are the patches and the queries together.
        context = torch.cat([self.norm_patches(patches), normed], dim=1)  # (I, N + M, D)
        q = rearrange(self.to_q(normed), "i m (heads d) -> i heads m d", heads=self.heads)
        k, v = rearrange(self.to_kv(context), "i n (two heads d) -> two i heads n d", two=2, heads=self.heads)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "i heads m d -> i m (heads d)")
        queries = queries + self.to_out(out)
        return queries + self.mlp(self.norm_mlp(queries))


class PerceiverResampler(nn.Module):
    """Resampler from any number of patches to `num_tokens` visual tokens.

    Args:
        num_tokens: visual tokens per view, at most the number of patches.
        depth: number of blocks of cross-attention and feed-forward.
        heads: attention heads; must divide `in_dim`.
        mlp_ratio: hidden width of the feed-forward relative to `in_dim`.
        positions: also add a learned vector to each visual token of the output.

    Raises:
        ValueError: `heads` does not divide `in_dim`, or `num_tokens` is below 1 or exceeds the number of patches.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        num_tokens: int,
        depth: int = 2,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        positions: bool = True,
    ):
        super().__init__()
        if in_dim % heads:
            raise ValueError(f"resampler.heads={heads} does not divide the encoder's width {in_dim}")
        self.num_tokens, self.out_dim = check_positive(num_tokens), in_dim
        self.queries = nn.Parameter(torch.randn(num_tokens, in_dim))
        self.blocks = nn.ModuleList(CrossAttentionBlock(in_dim, heads=heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(in_dim)
        self.positions = nn.Parameter(torch.randn(num_tokens, in_dim) * 0.02) if positions else None

    def num_tokens_out(self, num_patches: int) -> int:
        return check_at_most(self.num_tokens, num_patches)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D"]:
        self.num_tokens_out(patches.shape[1])
        tokens = repeat(self.queries, "m d -> i m d", i=patches.shape[0])
        for block in self.blocks:
            tokens = block(tokens, patches)
        tokens = self.norm(tokens)
        return tokens if self.positions is None else tokens + self.positions
