"""Split depthwise convolutions with a channel multiplier above 1 into several with multiplier 1.

FastViT uses them to widen its feature maps between stages. oneDNN has a fast kernel for multiplier 1; for 2 it falls
back to its slowest kernel, which takes five times as long in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.inference.exchange import exchange


class SplitDepthwise(nn.Conv2d):
    """A grouped convolution with one input and m output channels per group; shares the parameters of `conv`."""

    def __init__(self, conv: nn.Conv2d):
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        super().__init__(*shape, conv.groups, bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        several, options = self.out_channels // self.groups, (self.stride, self.padding, self.dilation, self.groups)
        maps = []
        for i in range(several):  # output channel c * m + i is the i-th map of channel c
            bias = None if self.bias is None else self.bias[i::several]
            maps.append(rearrange(F.conv2d(x, self.weight[i::several], bias, *options), "b c h w -> b h w c"))
        return rearrange(torch.stack(maps, dim=-1), "b h w c m -> b (c m) h w")


def is_widening(layer: nn.Module) -> bool:
    """Return whether a layer is a depthwise convolution with a channel multiplier above 1."""
    plain = type(layer) is nn.Conv2d and layer.padding_mode == "zeros"
    return plain and 1 < layer.groups == layer.in_channels < layer.out_channels


def split_depthwise(module: nn.Module) -> int:
    """Replace every such convolution inside a module in place; return their number."""
    return exchange(module, fits=is_widening, make=SplitDepthwise)
