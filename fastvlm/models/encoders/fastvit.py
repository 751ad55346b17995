"""FastViT: a hybrid encoder with convolutions where the map is large and attention where it is small.

The architecture is FastViTHD's (FastVLM, arXiv 2412.13303, section 3; FastViT, arXiv 2303.14189): a MobileOne stem,
RepMixer stages, then attention stages after a conditional position encoding. `reparameterize` folds its branches for
inference.

On a CPU two choices were measured to be faster: channels-last memory, and depthwise convolutions kept in float32 under
bf16 autocast, because bf16's backward of a strided depthwise convolution is 15 times slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.encoders.fastvit_blocks import AttentionBlock, MobileOne, PatchEmbed, RepCPE, RepMixerBlock


class FastViT(nn.Module):
    """Encoder from normalised images to patches, one per cell of `stride` x `stride` pixels, in row-major order.

    Args:
        dims: width of each stage; each stage after the first halves the map.
        depths: blocks in each stage; 0 leaves only the downsampling.
        attention: whether each stage uses attention; the others use RepMixer.
        stem_stride: stride of the stem, 2 or 4.
        mlp_ratio: hidden width of a ConvFFN relative to its input.
        out_dim: width of the patches, a multiple of the last of `dims`; None: the last of `dims`.
        kernel: kernel size of the depthwise convolutions in ConvFFN and between stages.
        layer_scale: initial LayerScale of a block's branches: 1e-5 for long training, near 1 for short.
        mean, std: pixel statistics this encoder was or will be trained with, per channel, for values in [0, 1].

    Raises:
        ValueError: `dims`, `depths` and `attention` differ in length, a stride or width is impossible, or (forward) the
            image size is not a multiple of the stride.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        attention: Sequence[bool],
        stem_stride: int = 4,
        mlp_ratio: float = 4.0,
        out_dim: int | None = None,
        kernel: int = 7,
        layer_scale: float = 1e-5,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        if not len(dims) == len(depths) == len(attention):
            raise ValueError(
                f"encoder: dims, depths, attention have {len(dims)}, {len(depths)}, {len(attention)} stages"
            )
        if stem_stride not in (2, 4):
            raise ValueError(f"encoder.stem_stride={stem_stride} is neither 2 nor 4")
        self.out_dim = dims[-1] if out_dim is None else out_dim
        if self.out_dim % dims[-1]:
            raise ValueError(f"encoder.out_dim={self.out_dim} is not a multiple of the last width {dims[-1]}")
        self.mean, self.std = tuple(mean), tuple(std)
        self.stride = stem_stride * 2 ** (len(dims) - 1)
        width = dims[0]
        self.stem = nn.Sequential(
            # FastViTHD's stem has no 1 x 1 branches.
            MobileOne(3, width, kernel=3, stride=2, scale=False),
            MobileOne(width, width, kernel=3, stride=stem_stride // 2, groups=width, scale=False),
            MobileOne(width, width, kernel=1),
        )
        self.stage_dims = list(dims)
        self.stage_strides = [stem_stride * 2**i for i in range(len(dims))]
        stages, self.ends = [], [0]
        for i, (dim, depth, attend) in enumerate(zip(dims, depths, attention)):
            block = AttentionBlock if attend else RepMixerBlock
            options = {"mlp_ratio": mlp_ratio, "kernel": kernel, "layer_scale": layer_scale}
            stages.append(PatchEmbed(width, dim, kernel=kernel) if i else nn.Identity())
            stages.append(RepCPE(dim) if attend else nn.Identity())
            stages.extend(block(dim, **options) for _ in range(depth))
            self.ends.append(len(stages))
            width = dim
        self.stages = nn.Sequential(*stages)
        self.final = MobileOne(width, self.out_dim, kernel=3, groups=width, squeeze=True)

    def grid(self, image_size: int) -> tuple[int, int]:
        if image_size % self.stride:
            raise ValueError(f"image_size={image_size} is not a multiple of the encoder's stride {self.stride}")
        return image_size // self.stride, image_size // self.stride

    def num_patches(self, image_size: int) -> int:
        height, width = self.grid(image_size)
        return height * width

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        for size in images.shape[-2:]:
            self.grid(size)
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        return rearrange(self.final(self.stages(x)), "i d h w -> i (h w) d")

    def advance(self, stage: int, x: Float[Tensor, "I C H W"]) -> Float[Tensor, "I D h w"]:
        """Compute the map of stage i (stage_dims[i], stage_strides[i]) from that of stage i - 1, or from images."""
        if stage == 0:
            x = self.stem(x.contiguous(memory_format=torch.channels_last))
        return self.stages[self.ends[stage] : self.ends[stage + 1]](x)

    def finish(self, x: Float[Tensor, "I C h w"]) -> Float[Tensor, "I D h w"]:
        """Apply the final convolution to the map of the last stage."""
        return self.final(x)

    @torch.no_grad()
    def reparameterize(self) -> FastViT:
        """Fold all branches and norms in place for inference; outputs equal those of `eval()`."""
        for block in self.modules():
            if isinstance(block, AttentionBlock) and isinstance(block.norm, nn.BatchNorm2d):
                block.fold_norm_into_qkv()
        replace_folded(self)
        return self.eval()


def replace_folded(module: nn.Module) -> None:
    for name, child in module.named_children():
        if hasattr(child, "folded"):
            setattr(module, name, child.folded())
        else:
            replace_folded(child)
