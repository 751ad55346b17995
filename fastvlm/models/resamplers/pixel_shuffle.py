"""Pixel shuffle of patches into wider tokens (Idefics3, arXiv 2408.12637; SmolVLM, arXiv 2504.05299; InternVL)."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import side_of


class PixelShuffleResampler(nn.Module):
    """Resampler that concatenates every `factor` x `factor` block of patches to one token, `factor`^2 times as wide.

    Args:
        factor: side of a block; must divide the side of the grid. It fixes the width, so the number of tokens follows
            from the image size.
        num_tokens: the only number of visual tokens per view accepted; None: any.

    Raises:
        ValueError: `factor` is below 1; (num_tokens_out, forward) the patches form no square grid, `factor` does not
            divide its side, or `num_tokens` is given and differs from the result.
    """

    def __init__(self, *, in_dim: int, factor: int = 2, num_tokens: int | None = None):
        super().__init__()
        if factor < 1:
            raise ValueError(f"resampler.factor={factor} must be at least 1")
        self.factor, self.num_tokens, self.out_dim = factor, num_tokens, in_dim * factor**2

    def num_tokens_out(self, num_patches: int) -> int:
        side = side_of(num_patches)
        divisors = [f for f in range(1, side + 1) if side % f == 0]
        if self.factor not in divisors:
            raise ValueError(
                f"resampler.factor={self.factor} does not divide the {side} x {side} patches of an image; "
                f"it may be {', '.join(map(str, divisors))}"
            )
        num_tokens = num_patches // self.factor**2
        if self.num_tokens not in (None, num_tokens):
            best = min(divisors, key=lambda f: abs(num_patches // f**2 - self.num_tokens))
            raise ValueError(
                f"resampler.num_tokens={self.num_tokens}, but {num_patches} patches in blocks of {self.factor} x "
                f"{self.factor} are {num_tokens} visual tokens; the nearest that fits is {num_patches // best**2}, "
                f"with resampler.factor={best}"
            )
        return num_tokens

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D_out"]:
        self.num_tokens_out(patches.shape[1])
        side = side_of(patches.shape[1])
        return rearrange(
            patches,
            "i (h a w b) d -> i (h w) (a b d)",
            h=side // self.factor,
            a=self.factor,
            b=self.factor,
        )
