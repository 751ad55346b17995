"""No resampling: every patch is a visual token (LLaVA, arXiv 2304.08485; FastVLM, arXiv 2412.13303)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class IdentityResampler(nn.Module):
    """Resampler that returns the patches unchanged, so their number follows the image size.

    Args:
        num_tokens: the only number of patches accepted; None: any.

    Raises:
        ValueError: (num_tokens_out, forward) `num_tokens` is given and is not the number of patches.
    """

    keeps_empty = True  # a zero patch (a position the encoder left empty) stays a zero token

    def __init__(self, *, in_dim: int, num_tokens: int | None = None):
        super().__init__()
        self.out_dim, self.num_tokens = in_dim, num_tokens

    def num_tokens_out(self, num_patches: int) -> int:
        if self.num_tokens not in (None, num_patches):
            raise ValueError(
                f"resampler.num_tokens={self.num_tokens}, but identity makes a visual token of each of the "
                f"{num_patches} patches; the only number that fits is {num_patches}: set that or null, another "
                "image_size, or a resampler that pools"
            )
        return num_patches

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I N D"]:
        self.num_tokens_out(patches.shape[1])
        return patches
