"""Attention of bfloat16 on a CPU as two products and a softmax.

`torch`'s fused kernel keeps the matrix of weights out of memory, but multiplies bfloat16 no faster than float32.
oneDNN's products do, so where that matrix is small it may as well be written down.
"""

from __future__ import annotations

import torch
from jaxtyping import BFloat16
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LARGEST = 1 << 26  # attention weights at once (128 MiB); beyond, the fused kernel
NAME = "fastvlm_products"


def attend(
    q: BFloat16[Tensor, "B H S d"],
    k: BFloat16[Tensor, "B G K d"],
    v: BFloat16[Tensor, "B G K d"],
    *,
    scale: float,
    bias: BFloat16[Tensor, "#B 1 S K"] | None = None,
) -> BFloat16[Tensor, "B H S d"]:
    """Softmax attention; H / G query heads share keys and values, and become rows of one product.

    Args:
        bias: added to the scaled scores; -inf hides a position.
    """
    shape, groups = q.shape, k.shape[1]
    weights = (q * scale).reshape(shape[0], groups, -1, shape[-1]) @ k.transpose(-2, -1)
    if bias is not None:
        weights.view(shape[0], groups, -1, shape[2], k.shape[2]).add_(bias[:, :, None])
    return (weights.softmax(-1) @ v).view(shape)


def pays(rows: int, heads: int, length: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `attend` is for this attention: bfloat16 on a CPU whose weights are few enough to be written down."""
    return dtype == torch.bfloat16 and device.type == "cpu" and rows * heads * length * columns <= LARGEST


def attend_in_transformers(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **more):
    """`attend` in the form of `transformers`' attention functions, for models without masks; else its `sdpa`."""
    (rows, heads, length, dim), causal = query.shape, more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    few = pays(rows, heads, length, key.shape[2], dtype=query.dtype, device=query.device)
    if not few or attention_mask is not None or causal or module.training:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    scale = dim**-0.5 if scaling is None else scaling
    return attend(query, key, value, scale=scale).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend_in_transformers)


def choose_in_timm(module: nn.Module, args: tuple) -> None:
    """Before each call of an attention layer of timm: products where they pay, else the fused kernel."""
    x = args[0]
    tokens = x[0].numel() // width_of(module)  # whether channels come first or last
    module.fused_attn = not pays(len(x), module.num_heads, tokens, tokens, dtype=x.dtype, device=x.device)


def width_of(module: nn.Module) -> int | None:
    """Channels of what an attention layer of timm takes; None of a layer in another form."""
    projection = getattr(module, "qkv", None) or getattr(module, "q_proj", None) or getattr(module, "q", None)
    return getattr(projection, "in_features", None)


def use_products(encoder: nn.Module) -> None:
    """Have an encoder of timm or transformers attend by products where they pay, by the switch each of them has."""
    for module in encoder.modules():
        known = hasattr(module, "fused_attn") and hasattr(module, "num_heads") and width_of(module) is not None
        if known and choose_in_timm not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(choose_in_timm)
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.config._attn_implementation = NAME
