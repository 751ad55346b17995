"""Two layers from the vision width to the text width (LLaVA-1.5, arXiv 2310.03744), normalised at the end."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class MLPProjector(nn.Sequential):
    """Linear, GELU, Linear, LayerNorm.

    Args:
        norm: end in a LayerNorm, so that visual tokens have one scale whatever the encoder's; False is LLaVA-1.5's own.
    """

    def __init__(self, *, in_dim: int, out_dim: int, norm: bool = True):
        super().__init__(
            nn.Linear(in_dim, out_dim),
            nn.GELU(),
            nn.Linear(out_dim, out_dim),
            nn.LayerNorm(out_dim) if norm else nn.Identity(),
        )

    def forward(self, tokens: Float[Tensor, "I M D_v"]) -> Float[Tensor, "I M D_t"]:
        return super().forward(tokens)
