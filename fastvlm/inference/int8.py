"""Linear layers with 8-bit weights.

On a CPU the products are oneDNN's and FBGEMM's own, which read a quarter of float32's bytes; elsewhere they are
torchao's. Weights are quantised symmetrically per output channel. `dynamic` also rounds what comes in, per row, to 8
bits and multiplies integers; `weight_only` keeps it in bf16.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.inference.exchange import exchange

KINDS = ("dynamic", "weight_only")
SMALLEST = 64  # below this width rounding costs more than it saves
STEP, MIDDLE = 1 / 127, 128  # how a row is rounded once its largest value is 1: to -127..127 steps around the middle


def round_weight(weight: Float[Tensor, "O I"]) -> tuple[Tensor, Tensor]:
    """(int8 weight, scale of every output channel)."""
    scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class DynamicInt8Linear(nn.Module):
    """Integer products on a CPU. Each row is scaled to 1 before it is rounded, always by the same steps, so that what
    comes of it depends on no other row; torch's own dynamic products take one range for all rows."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = round_weight(linear.weight.detach())
        zero = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():  # torch means to give such tensors up one day
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        rows = x.float()
        largest = rows.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        out = product(rows / largest, STEP, MIDDLE, self.packed).mul_(largest)
        if self.bias is not None:
            out = out.add_(self.bias)
        return out.to(x.dtype)


class WeightOnlyInt8Linear(nn.Module):
    """8-bit weights against bf16 rows on a CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = round_weight(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.bfloat16())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        rows = x.to(torch.bfloat16).reshape(-1, self.in_features)
        out = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def is_wide_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and min(layer.weight.shape) >= SMALLEST


def quantise_linears(module: nn.Module, *, kind: str) -> int:
    """Exchange every wide linear layer of a module (in place) for its 8-bit form; returns how many.

    Args:
        kind: `dynamic` or `weight_only`.

    Raises:
        ValueError: another kind; a device that needs torchao, which is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"int8 of kind {kind} is not one of {', '.join(KINDS)}")
    if next(module.parameters()).device.type != "cpu":
        return _quantise_by_torchao(module, kind=kind)
    form = DynamicInt8Linear if kind == "dynamic" else WeightOnlyInt8Linear
    return exchange(module, fits=is_wide_linear, make=form)


def _quantise_by_torchao(module: nn.Module, *, kind: str) -> int:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError("int8 on this device needs torchao: pip install '.[quant]'") from None
    found = sum(map(is_wide_linear, module.modules()))
    config = Int8DynamicActivationInt8WeightConfig() if kind == "dynamic" else Int8WeightOnlyConfig()
    quantize_(module, config, filter_fn=lambda layer, _: is_wide_linear(layer))
    return found
