"""Features of earlier stages beside those of the last: FastVLM's multi-scale option (arXiv 2412.13303, section 3.1).

Maps of earlier stages are pooled to the size of the last and concatenated in the channels; the paper's Table 2 compares
average pooling with a depthwise convolution and takes the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

POOLS = ("depthwise", "average")


class MultiScaleEncoder(nn.Module):
    """The patches of an encoder with stages, and of each cell the features of earlier stages, pooled, in more channels.

    Args:
        encoder: has `stage_dims`, `stage_strides`, `advance` and `finish`: FastViT here, a timm model with stages.
        stages: which earlier stages take part, from 0; None: all but the last.
        pool: `average`, or `depthwise`: a convolution of stride and kernel one cell, which begins as the average.

    Raises:
        ValueError: an encoder without stages, a stage that is not there or is the last, an unknown pool.
    """

    def __init__(self, encoder: nn.Module, *, stages: Sequence[int] | None = None, pool: str = "depthwise"):
        super().__init__()
        dims, strides = stages_of(encoder)
        last = len(dims) - 1
        self.stages = list(range(last)) if stages is None else list(stages)
        for stage in self.stages:
            if not 0 <= stage < last:
                raise ValueError(f"encoder.stages: {stage} is not one of the earlier stages 0 to {last - 1}")
        if pool not in POOLS:
            raise ValueError(f"encoder.pool={pool} is none of {', '.join(POOLS)}")
        self.encoder = encoder
        self.mean, self.std, self.stride = encoder.mean, encoder.std, encoder.stride
        self.out_dim = encoder.out_dim + sum(dims[stage] for stage in self.stages)
        self.pools = nn.ModuleDict(
            {str(stage): pooling(pool, dims[stage], encoder.stride // strides[stage]) for stage in self.stages}
        )

    def grid(self, image_size: int) -> tuple[int, int]:
        return self.encoder.grid(image_size)

    def num_patches(self, image_size: int) -> int:
        return self.encoder.num_patches(image_size)

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        for size in images.shape[-2:]:
            self.grid(size)
        x, pooled = images, []
        for stage in range(len(self.encoder.stage_dims)):
            x = self.encoder.advance(stage, x)
            if str(stage) in self.pools:
                pooled.append(self.pools[str(stage)](x))
        return rearrange(torch.cat([self.encoder.finish(x), *pooled], dim=1), "i d h w -> i (h w) d")

    def reparameterize(self) -> MultiScaleEncoder:
        """Folds the encoder's branches, in place, for inference."""
        self.encoder.reparameterize()
        return self.eval()


def stages_of(encoder: nn.Module) -> tuple[list[int], list[int]]:
    """Widths and strides of an encoder's stages.

    Raises:
        ValueError: it has none.
    """
    if not all(hasattr(type(encoder), name) for name in ("advance", "finish")):
        raise ValueError(
            f"encoder.encoder: {type(encoder).__name__} has no stages; choose one that has, such as fastvithd"
        )
    return encoder.stage_dims, encoder.stage_strides


def pooling(pool: str, dim: int, cell: int) -> nn.Module:
    """From a map of `cell` x `cell` positions a patch to one of a position a patch."""
    if pool == "average":
        return nn.AvgPool2d(cell)
    conv = nn.Conv2d(dim, dim, cell, cell, groups=dim)
    nn.init.constant_(conv.weight, 1 / cell**2)
    nn.init.zeros_(conv.bias)
    return conv
