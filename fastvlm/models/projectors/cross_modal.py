"""Cross-modal adapter: visual tokens attend to each other and to learned queries before they are projected.

Kinds of attention: full; linear in the number of tokens (arXiv 2006.16236, equations 4 and 5); sparse, a local window
(Longformer, arXiv 2004.05150, section 3.1); strided (Sparse Transformer, arXiv 1904.10509, section 4.2). The last two
are computed in blocks, so their cost grows with the number of attended pairs only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

FORMS = ("full", "linear", "sparse", "strided")


class CrossModalAdapter(nn.Module):
    """Pre-norm residual blocks of attention and feed-forward at the vision width, followed by a linear layer.

    Distances between tokens are counted in reading order. The learned queries act as extra keys and values that every
    token attends to, whatever the kind of attention.

    Args:
        attention: `full`, `linear`, `sparse` or `strided`.
        depth: number of blocks.
        heads: attention heads; must divide `in_dim`.
        num_queries: learned queries of each block; 0: tokens attend only to each other.
        window: for `sparse`: the largest distance, on either side, at which tokens attend to each other.
        stride: for `strided`: tokens attend to those a multiple of `stride` away; with the side of the grid, to their
            column.
        mlp_ratio: hidden width of the feed-forward relative to `in_dim`.
        norm: end with a LayerNorm.

    Raises:
        ValueError: `attention` is unknown, `heads` does not divide `in_dim`, or `window`, `stride` or `num_queries` is
            too small.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        attention: str = "full",
        depth: int = 1,
        heads: int = 8,
        num_queries: int = 16,
        window: int = 8,
        stride: int = 8,
        mlp_ratio: float = 2.0,
        norm: bool = True,
    ):
        super().__init__()
        if attention not in FORMS:
            raise ValueError(f"projector.attention={attention} is not one of {', '.join(FORMS)}")
        if in_dim % heads:
            raise ValueError(f"projector.heads={heads} does not divide the resampler's width {in_dim}")
        for key, value, least in (("window", window, 1), ("stride", stride, 1), ("num_queries", num_queries, 0)):
            if value < least:
                raise ValueError(f"projector.{key}={value} must be at least {least}")
        sizes = dict(heads=heads, num_queries=num_queries, window=window, stride=stride, mlp_ratio=mlp_ratio)
        self.blocks = nn.ModuleList(AdapterBlock(in_dim, attention=attention, **sizes) for _ in range(depth))
        self.project = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim) if norm else nn.Identity()

    def forward(self, tokens: Float[Tensor, "I M D_v"]) -> Float[Tensor, "I M D_t"]:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(self.project(tokens))


class AdapterBlock(nn.Module):
    def __init__(
        self, dim: int, *, attention: str, heads: int, num_queries: int, window: int, stride: int, mlp_ratio: float
    ):
        super().__init__()
        self.attention, self.heads, self.window, self.stride = attention, heads, window, stride
        self.norm, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(1, num_queries, dim)) if num_queries else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim, bias=False)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        normed, count = self.norm(tokens), tokens.shape[1]
        context = normed
        if self.queries is not None:
            context = torch.cat([normed, self.queries.expand(len(normed), -1, -1).to(normed.dtype)], dim=1)
        q, k, v = (
            rearrange(part, "i n (heads d) -> i heads n d", heads=self.heads)
            for part in (self.to_q(normed), self.to_k(context), self.to_v(context))
        )
        if self.attention == "full":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.attention == "linear":
            out = linear_attention(q, k, v)
        else:
            own, seen_by_all = (k[:, :, :count], v[:, :, :count]), (k[:, :, count:], v[:, :, count:])
            if self.attention == "sparse":
                out = window_attention(q, own, seen_by_all, window=self.window)
            else:
                out = strided_attention(q, own, seen_by_all, stride=self.stride)
        tokens = tokens + self.to_out(rearrange(out, "i heads n d -> i n (heads d)"))
        return tokens + self.mlp(self.norm_mlp(tokens))


def linear_attention(
    q: Float[Tensor, "I heads M d"], k: Float[Tensor, "I heads K d"], v: Float[Tensor, "I heads K d"]
) -> Float[Tensor, "I heads M d"]:
    """Attend with weights f(q) . f(k), normalised to sum to 1, f = elu + 1, without forming the M x K matrix."""
    f_q, f_k = F.elu(q) + 1, F.elu(k) + 1
    summary = f_k.mT @ v  # (I, heads, d, d)
    total = f_q @ f_k.sum(dim=2)[..., None]  # (I, heads, M, 1)
    return f_q @ summary / total


def window_attention(
    q: Float[Tensor, "I heads M d"], own: tuple[Tensor, Tensor], seen_by_all: tuple[Tensor, Tensor], *, window: int
) -> Float[Tensor, "I heads M d"]:
    """Attend to `seen_by_all` and to tokens at most `window` away, in chunks of `window` that read three chunks."""
    count, device = q.shape[2], q.device
    chunks = -(-count // window)
    behind = chunks * window - count
    q = rearrange(F.pad(q, (0, 0, 0, behind)), "i heads (c w) d -> i heads c w d", w=window)
    k, v = (
        torch.cat(
            [
                F.pad(x, (0, 0, window, behind + window)).unfold(2, 3 * window, window).mT,  # (I, heads, c, 3w, d)
                repeat(shared, "i heads n d -> i heads c n d", c=chunks),
            ],
            dim=3,
        )
        for x, shared in zip(own, seen_by_all)
    )
    i = torch.arange(chunks * window, device=device).view(chunks, window, 1)
    j = (torch.arange(chunks, device=device) * window)[:, None, None] + torch.arange(-window, 2 * window, device=device)
    # Padding queries at the end attend to themselves: an empty row of the mask would give NaN.
    visible = ((i - j).abs() <= window) & (j >= 0) & ((j < count) | (i == j))
    visible = F.pad(visible, (0, seen_by_all[0].shape[2]), value=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return rearrange(out, "i heads c w d -> i heads (c w) d")[:, :, :count]


def strided_attention(
    q: Float[Tensor, "I heads M d"], own: tuple[Tensor, Tensor], seen_by_all: tuple[Tensor, Tensor], *, stride: int
) -> Float[Tensor, "I heads M d"]:
    """Attend to `seen_by_all` and to tokens a multiple of `stride` away."""
    count, device = q.shape[2], q.device
    behind = -count % stride
    q, k, v = (rearrange(F.pad(x, (0, 0, 0, behind)), "i heads (n s) d -> i heads s n d", s=stride) for x in (q, *own))
    k, v = (
        torch.cat([x, repeat(shared, "i heads n d -> i heads s n d", s=stride)], dim=3)
        for x, shared in zip((k, v), seen_by_all)
    )
    visible = None
    if behind:
        place = rearrange(torch.arange(count + behind, device=device), "(n s) -> s n", s=stride)
        visible = (place[:, None, :] < count) | (place[:, None, :] == place[:, :, None])  # (s, n, n)
        visible = F.pad(visible, (0, seen_by_all[0].shape[2]), value=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return rearrange(out, "i heads s n d -> i heads (n s) d")[:, :, :count]
