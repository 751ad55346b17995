"""No resampling: every patch is a visual token (LLaVA, arXiv 2304.08485; FastVLM, arXiv 2412.13303)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class IdentityResampler(nn.Module):
    """Passes patches on. Their number, and so the sequence's length, follows the image size."""

    def __init__(self, *, in_dim: int):
        super().__init__()
        self.out_dim = in_dim

    def num_tokens_out(self, num_patches: int) -> int:
        return num_patches

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I N D"]:
        return patches
