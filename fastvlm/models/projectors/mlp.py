"""An MLP from the vision width to the text width (LLaVA-1.5, arXiv 2310.03744)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU}


class MLPProjector(nn.Sequential):
    """MLP; by default Linear, GELU, Linear, LayerNorm.

    Args:
        norm: end with a LayerNorm, so that the scale of visual tokens does not depend on the encoder; LLaVA-1.5 has
            none.
        depth: number of linear layers, with the activation between them.
        activation: `gelu`, or `silu` as in Honeybee's readout.
        input_norm: begin with a LayerNorm, as InternVL does after its pixel shuffle.

    Raises:
        ValueError: `depth` is below 1, or `activation` is unknown.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        norm: bool = True,
        depth: int = 2,
        activation: str = "gelu",
        input_norm: bool = False,
    ):
        if depth < 1:
            raise ValueError(f"projector.depth={depth} must be at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"projector.activation={activation} is not one of {', '.join(ACTIVATIONS)}")
        layers = [nn.Linear(in_dim, out_dim)]
        for _ in range(1, depth):
            layers += [ACTIVATIONS[activation](), nn.Linear(out_dim, out_dim)]
        first = [nn.LayerNorm(in_dim)] if input_norm else []
        super().__init__(*first, *layers, nn.LayerNorm(out_dim) if norm else nn.Identity())

    def forward(self, tokens: Float[Tensor, "I M D_v"]) -> Float[Tensor, "I M D_t"]:
        return super().forward(tokens)
