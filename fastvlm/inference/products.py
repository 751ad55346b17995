"""Unfused bfloat16 attention on a CPU: two matrix products and a softmax.

`torch`'s fused kernel does not materialise the attention weights, but multiplies bfloat16 no faster than float32.
oneDNN's matrix products are faster in bfloat16, so this pays off where the weights are small enough to materialise.
"""

from __future__ import annotations

import torch
from jaxtyping import BFloat16
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LARGEST = 1 << 26  # attention weights at once (128 MiB); above this the fused kernel is used
NAME = "fastvlm_products"


def attend(
    q: BFloat16[Tensor, "B H S d"],
    k: BFloat16[Tensor, "B G K d"],
    v: BFloat16[Tensor, "B G K d"],
    *,
    scale: float,
    bias: BFloat16[Tensor, "#B 1 S K"] | None = None,
) -> BFloat16[Tensor, "B H S d"]:
    """Compute softmax attention; the H / G query heads that share keys and values become rows of one product.

    Args:
        bias: added to the scaled scores; -inf hides a position.
    """
    shape, groups = q.shape, k.shape[1]
    weights = (q * scale).reshape(shape[0], groups, -1, shape[-1]) @ k.transpose(-2, -1)
    if bias is not None:
        weights.view(shape[0], groups, -1, shape[2], k.shape[2]).add_(bias[:, :, None])
    return (weights.softmax(-1) @ v).view(shape)


def pays(rows: int, heads: int, length: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether to use `attend`: bfloat16 on a CPU, with few enough attention weights to materialise."""
    return dtype == torch.bfloat16 and device.type == "cpu" and rows * heads * length * columns <= LARGEST


def attend_in_transformers(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **more):
    """`attend` as an attention function of `transformers`; falls back to its `sdpa` with masks or causal attention."""
    (rows, heads, length, dim), causal = query.shape, more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    few = pays(rows, heads, length, key.shape[2], dtype=query.dtype, device=query.device)
    if not few or attention_mask is not None or causal or module.training:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    scale = dim**-0.5 if scaling is None else scaling
    return attend(query, key, value, scale=scale).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend_in_transformers)


def choose_in_timm(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a timm attention layer: choose between unfused products and the fused kernel."""
    x = args[0]
    tokens = x[0].numel() // width_of(module)  # correct for channels first and last
    module.fused_attn = not pays(len(x), module.num_heads, tokens, tokens, dtype=x.dtype, device=x.device)


def width_of(module: nn.Module) -> int | None:
    """Return the input channels of a timm attention layer; None for other layers."""
    projection = getattr(module, "qkv", None) or getattr(module, "q_proj", None) or getattr(module, "q", None)
    return getattr(projection, "in_features", None)


def use_products(encoder: nn.Module) -> None:
    """Switch the attention layers of a timm or transformers encoder to unfused products wherever `pays` holds."""
    for module in encoder.modules():
        known = hasattr(module, "fused_attn") and hasattr(module, "num_heads") and width_of(module) is not None
        if known and choose_in_timm not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(choose_in_timm)
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.config._attn_implementation = NAME
