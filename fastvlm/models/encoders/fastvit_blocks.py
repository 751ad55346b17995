"""The blocks of FastViT: parallel branches in training, one convolution each in inference.

MobileOne (arXiv 2206.04040), RepMixer, ConvFFN and the conditional position encoding of FastViT (arXiv 2303.14189).
Every block with branches has `folded()`, which returns a plain module that computes the same as the block in `eval()`.
Modules are in the order of `timm.models.fastvit`, so weights can be copied one after the other.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Up to this many positions plain matrix products are faster than the fused kernel on a CPU, forward and backward.
PLAIN_ATTENTION_UP_TO = 512


def fold_norm(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of `norm(conv(x))` in inference, for a kernel with output channels first."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), norm.bias - norm.running_mean * scale


def plain_conv(weight: Tensor, bias: Tensor, *, stride: int, groups: int) -> nn.Conv2d:
    out_dim, in_dim, kernel, _ = weight.shape
    conv = nn.Conv2d(in_dim * groups, out_dim, kernel, stride, kernel // 2, groups=groups)
    conv.weight, conv.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return conv


def identity_kernel(dim: int, groups: int, kernel: int, like: Tensor) -> Tensor:
    """Return the kernel of a convolution that returns its input."""
    weight = torch.zeros(dim, dim // groups, kernel, kernel, dtype=like.dtype, device=like.device)
    index = torch.arange(dim, device=like.device)
    weight[index, index % (dim // groups), kernel // 2, kernel // 2] = 1
    return weight


def float32_on_cpu(x: Tensor) -> AbstractContextManager:
    """Disable autocast on a CPU, where bf16 depthwise convolutions are slower; do nothing on other devices."""
    return torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else nullcontext()


class ConvNorm(nn.Module):
    """Convolution followed by BatchNorm."""

    def __init__(self, in_dim: int, out_dim: int, *, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        conv, stride = self.conv, self.conv.stride[0]
        if conv.kernel_size == (1, 1) and stride > 1:
            # Slicing first gives the same result. It also avoids a crash of torch 2.15 on a CPU: the weight gradient of
            # a strided 1 x 1 convolution of a 3-channel channels-last image writes past its buffer (from 96 px on).
            x, stride = x[..., ::stride, ::stride].contiguous(memory_format=torch.channels_last), 1
        run = lambda x: self.bn(F.conv2d(x, conv.weight, None, stride, conv.padding, 1, conv.groups))
        if conv.groups == 1:
            return run(x)
        with float32_on_cpu(x):
            return run(x.to(conv.weight.dtype))

    def kernel_bias(self) -> tuple[Tensor, Tensor]:
        return fold_norm(self.conv.weight, self.bn)

    def folded(self) -> nn.Conv2d:
        return plain_conv(*self.kernel_bias(), stride=self.conv.stride[0], groups=self.conv.groups)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the spatial means of all channels (arXiv 1709.01507)."""

    def __init__(self, dim: int, *, ratio: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, max(1, round(dim / ratio)), 1)
        self.fc2 = nn.Conv2d(self.fc1.out_channels, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class MobileOne(nn.Module):
    """Sum of identity, k x k and 1 x 1 branches, each with BatchNorm (arXiv 2206.04040).

    The identity branch exists if the widths are equal and the stride is 1, the 1 x 1 branch (`scale`) if k > 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        conv: bool = True,
        scale: bool = True,
        squeeze: bool = False,
        activation: bool = True,
    ):
        super().__init__()
        self.kernel, self.stride, self.groups = kernel, stride, groups
        self.se = SqueezeExcite(out_dim) if squeeze else nn.Identity()
        self.identity = nn.BatchNorm2d(in_dim) if in_dim == out_dim and stride == 1 else None
        self.conv = ConvNorm(in_dim, out_dim, kernel=kernel, stride=stride, groups=groups) if conv else None
        small = scale and kernel > 1
        self.scale = ConvNorm(in_dim, out_dim, kernel=1, stride=stride, groups=groups) if small else None
        self.act = nn.GELU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch(x) for branch in (self.scale, self.identity, self.conv) if branch is not None]
        return self.act(self.se(reduce(torch.add, branches)))

    def kernel_bias(self) -> tuple[Tensor, Tensor]:
        parts = []
        if self.conv is not None:
            parts.append(self.conv.kernel_bias())
        if self.scale is not None:
            weight, bias = self.scale.kernel_bias()
            parts.append((F.pad(weight, [self.kernel // 2] * 4), bias))
        if self.identity is not None:
            dim = self.identity.num_features
            same = identity_kernel(dim, self.groups, self.kernel, self.identity.weight)
            parts.append(fold_norm(same, self.identity))
        return sum(weight for weight, _ in parts), sum(bias for _, bias in parts)

    def folded(self) -> nn.Sequential:
        conv = plain_conv(*self.kernel_bias(), stride=self.stride, groups=self.groups)
        return nn.Sequential(conv, self.se, self.act)


class LayerScale(nn.Module):
    def __init__(self, dim: int, *, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(-1, 1, 1)


class RepMixer(nn.Module):
    """Token mixer x + scale * (mixer(x) - norm(x)); folds to one depthwise 3 x 3 convolution in inference."""

    def __init__(self, dim: int, *, kernel: int = 3, layer_scale: float):
        super().__init__()
        self.norm = MobileOne(dim, dim, kernel=kernel, groups=dim, conv=False, scale=False, activation=False)
        self.mixer = MobileOne(dim, dim, kernel=kernel, groups=dim, activation=False)
        self.layer_scale = LayerScale(dim, init=layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale(self.mixer(x) - self.norm(x))

    def folded(self) -> nn.Conv2d:
        (mixer, mixer_bias), (norm, norm_bias) = self.mixer.kernel_bias(), self.norm.kernel_bias()
        gamma = self.layer_scale.gamma
        same = identity_kernel(len(gamma), len(gamma), self.mixer.kernel, gamma)
        weight = same + gamma.view(-1, 1, 1, 1) * (mixer - norm)
        return plain_conv(weight, gamma * (mixer_bias - norm_bias), stride=1, groups=len(gamma))


class ConvFFN(nn.Module):
    """Depthwise convolution (7 x 7 by default), then a two-layer feed-forward at every position."""

    def __init__(self, dim: int, *, ratio: float, kernel: int = 7):
        super().__init__()
        self.conv = ConvNorm(dim, dim, kernel=kernel, groups=dim)
        self.fc1 = nn.Conv2d(dim, int(dim * ratio), 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(int(dim * ratio), dim, 1)
        for conv in (self.conv.conv, self.fc1, self.fc2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    def __init__(self, dim: int, *, mlp_ratio: float, kernel: int = 7, layer_scale: float):
        super().__init__()
        self.token_mixer = RepMixer(dim, layer_scale=layer_scale)
        self.mlp = ConvFFN(dim, ratio=mlp_ratio, kernel=kernel)
        self.layer_scale = LayerScale(dim, init=layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale(self.mlp(x))


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a map."""

    def __init__(self, dim: int, *, head_dim: int = 32):
        super().__init__()
        head_dim = min(head_dim, dim)
        if dim % head_dim:
            raise ValueError(
                f"encoder.dims: an attention stage of width {dim} is not a multiple of head_dim {head_dim}"
            )
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv = self.qkv(rearrange(x, "b c h w -> b (h w) c"))
        q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, d=self.head_dim)
        if x.device.type == "cpu" and height * width <= PLAIN_ATTENTION_UP_TO:
            weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
            out = weights.to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(rearrange(out, "b heads n d -> b n (heads d)"))
        return rearrange(out, "b (h w) c -> b c h w", h=height)


class AttentionBlock(nn.Module):
    def __init__(self, dim: int, *, mlp_ratio: float, kernel: int = 7, layer_scale: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.token_mixer = Attention(dim)
        self.layer_scale_1 = LayerScale(dim, init=layer_scale)
        self.mlp = ConvFFN(dim, ratio=mlp_ratio, kernel=kernel)
        self.layer_scale_2 = LayerScale(dim, init=layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1(self.token_mixer(self.norm(x)))
        return x + self.layer_scale_2(self.mlp(x))

    def fold_norm_into_qkv(self) -> None:
        """Fold the norm, a scale and shift per channel in inference, into the QKV projection that follows it."""
        old, norm = self.token_mixer.qkv, self.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        qkv = nn.Linear(old.in_features, old.out_features)
        qkv.weight = nn.Parameter((old.weight * scale).detach())
        qkv.bias = nn.Parameter((old.weight @ shift).detach())
        self.token_mixer.qkv, self.norm = qkv, nn.Identity()


class RepCPE(nn.Module):
    """Conditional position encoding: adds the output of a depthwise convolution to its input (arXiv 2102.10882)."""

    def __init__(self, dim: int, *, kernel: int = 7):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, 1, kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        with float32_on_cpu(x):
            return self.conv(x.to(self.conv.weight.dtype)) + x

    def folded(self) -> nn.Conv2d:
        dim = self.conv.groups
        weight = self.conv.weight + identity_kernel(dim, dim, self.conv.kernel_size[0], self.conv.weight)
        return plain_conv(weight, self.conv.bias, stride=1, groups=dim)


class LargeKernelConv(nn.Module):
    """Parallel grouped convolutions with a large and a 3 x 3 kernel (arXiv 2203.06717); by default halves the map."""

    def __init__(self, in_dim: int, out_dim: int, *, kernel: int, stride: int = 2):
        super().__init__()
        groups = math.gcd(in_dim, out_dim)
        self.large = ConvNorm(in_dim, out_dim, kernel=kernel, stride=stride, groups=groups)
        self.small = ConvNorm(in_dim, out_dim, kernel=3, stride=stride, groups=groups)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.large(x) + self.small(x))

    def folded(self) -> nn.Sequential:
        (large, large_bias), (small, small_bias) = self.large.kernel_bias(), self.small.kernel_bias()
        conv = self.large.conv
        small = F.pad(small, [(conv.kernel_size[0] - 3) // 2] * 4)
        folded = plain_conv(large + small, large_bias + small_bias, stride=conv.stride[0], groups=conv.groups)
        return nn.Sequential(folded, self.act)


class PatchEmbed(nn.Sequential):
    """Downsampling between two stages: halves the map and changes its width."""

    def __init__(self, in_dim: int, out_dim: int, *, kernel: int):
        super().__init__(LargeKernelConv(in_dim, out_dim, kernel=kernel), MobileOne(out_dim, out_dim, kernel=1))
