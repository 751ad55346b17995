"""FastVLM's multi-scale features (arXiv 2412.13303, section 3.1): earlier stages in addition to the last one.

Maps of earlier stages are pooled to the size of the last and concatenated along the channels. The paper's Table 2
compares average pooling with a depthwise convolution and chooses the latter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

POOLS = ("depthwise", "average")


class MultiScaleEncoder(nn.Module):
    """Encoder that concatenates the pooled features of earlier stages to its patches.

    Args:
        encoder: has `stage_dims`, `stage_strides`, `advance` and `finish`, as `FastViT` and timm models with stages do.
        stages: earlier stages to use, counted from 0; None: all but the last.
        pool: `average`, or `depthwise`: a convolution with kernel and stride of one cell, initialised to the average.

    Raises:
        ValueError: the encoder has no stages, `stages` names one that does not exist or is the last, or `pool` is
            unknown.
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
            raise ValueError(f"encoder.pool={pool} is not one of {', '.join(POOLS)}")
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
        """Fold the encoder's branches in place for inference."""
        self.encoder.reparameterize()
        return self.eval()


def stages_of(encoder: nn.Module) -> tuple[list[int], list[int]]:
    """Return the widths and strides of an encoder's stages.

    Raises:
        ValueError: the encoder has no stages.
    """
    if not all(hasattr(type(encoder), name) for name in ("advance", "finish")):
        raise ValueError(
            f"encoder.encoder: {type(encoder).__name__} has no stages; choose one that has, such as fastvithd"
        )
    return encoder.stage_dims, encoder.stage_strides


def pooling(pool: str, dim: int, cell: int) -> nn.Module:
    """Build a pooling that reduces every `cell` x `cell` positions of a map to one."""
    if pool == "average":
        return nn.AvgPool2d(cell)
    conv = nn.Conv2d(dim, dim, cell, cell, groups=dim)
    nn.init.constant_(conv.weight, 1 / cell**2)
    nn.init.zeros_(conv.bias)
    return conv
