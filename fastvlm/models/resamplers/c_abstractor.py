"""C-Abstractor: convolutions before and after adaptive pooling (Honeybee, arXiv 2312.06742, section 3.2)."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from fastvlm.models.resamplers.counts import check_at_most, check_square, side_of
from fastvlm.models.resamplers.positions import GridPositions


class CAbstractorResampler(nn.Module):
    """Bottleneck blocks with squeeze-excite before and after pooling to the grid of visual tokens.

    Honeybee's two-layer readout is `projector=mlp projector.activation=silu projector.norm=false`.

    Args:
        num_tokens: visual tokens per view, a square number, at most the number of patches. Honeybee: 144.
        dim: width of the blocks and of the visual tokens; None: the encoder's. Honeybee: 1024.
        depth: number of blocks before the pooling, and again after it.
        positions: side of the grid of learned positions added to the patches, interpolated for other grids; 0: none.

    Raises:
        ValueError: `depth` is below 1, `num_tokens` is not a square or exceeds the number of patches, or the patches
            form no square grid.
    """

    def __init__(self, *, in_dim: int, num_tokens: int, dim: int | None = None, depth: int = 3, positions: int = 24):
        super().__init__()
        if depth < 1:
            raise ValueError(f"resampler.depth={depth} must be at least 1; without blocks use resampler=avgpool")
        side, dim = check_square(num_tokens), in_dim if dim is None else dim
        self.num_tokens, self.out_dim = num_tokens, dim
        self.positions = GridPositions(positions, in_dim) if positions else None
        # Honeybee's authors use timm's RegNet stage: 1 x 1, depthwise 3 x 3, squeeze-excite, 1 x 1.
        options = dict(stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.net = nn.Sequential(
            RegStage(depth, in_dim, dim, **options),
            nn.AdaptiveAvgPool2d(side),
            RegStage(depth, dim, dim, **options),
        )

    def num_tokens_out(self, num_patches: int) -> int:
        side_of(num_patches)
        return check_at_most(self.num_tokens, num_patches)

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D_out"]:
        self.num_tokens_out(patches.shape[1])
        if self.positions is not None:
            patches = self.positions(patches)
        grid = rearrange(patches, "i (h w) d -> i d h w", h=side_of(patches.shape[1]))
        return rearrange(self.net(grid), "i d h w -> i (h w) d")
