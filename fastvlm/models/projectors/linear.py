"""One linear layer from the vision width to the text width (LLaVA, arXiv 2304.08485; Idefics3, 2408.12637)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class LinearProjector(nn.Sequential):
    """A linear layer, optionally preceded by a norm.

    Args:
        bias: whether the linear layer has a bias; in Idefics3, SmolVLM and Gemma 3 it has none.
        norm: norm before the linear layer: `layer`, `rms` (Gemma 3) or None.

    Raises:
        ValueError: `norm` is unknown.
    """

    def __init__(self, *, in_dim: int, out_dim: int, bias: bool = True, norm: str | None = None):
        if norm is not None and norm not in NORMS:
            raise ValueError(f"projector.norm={norm} is not one of null, {', '.join(NORMS)}")
        super().__init__(
            NORMS[norm](in_dim, eps=1e-6) if norm else nn.Identity(),
            nn.Linear(in_dim, out_dim, bias=bias),
        )

    def forward(self, tokens: Float[Tensor, "I M D_v"]) -> Float[Tensor, "I M D_t"]:
        return super().forward(tokens)
