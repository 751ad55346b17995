"""Linear layers with 8-bit weights.

On a CPU the kernels are those of oneDNN and FBGEMM, which read a quarter of the bytes of float32; elsewhere they are
torchao's. Weights are quantised symmetrically per output channel. `dynamic` also quantises the input of a layer to 8
bits, per row, and multiplies integers; `weight_only` keeps the input in bf16.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.inference.exchange import exchange

KINDS = ("dynamic", "weight_only")
SMALLEST = 64  # below this width, quantisation costs more than it saves
STEP, MIDDLE = 1 / 127, 128  # scale and zero point of a row whose largest absolute value is 1


def round_weight(weight: Float[Tensor, "O I"]) -> tuple[Tensor, Tensor]:
    """Quantise a weight to int8; return it (O, I) and its scale per output channel (O,)."""
    scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class DynamicInt8Linear(nn.Module):
    """An int8 x int8 linear layer for the CPU.

    Each row is scaled to a maximum of 1 and then quantised with the same fixed scale, so its output does not depend on
    other rows; torch's own dynamic quantisation uses one range for all rows.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = round_weight(linear.weight.detach())
        zero = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():  # quantised tensors are deprecated in torch
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
    """A linear layer with int8 weights and bf16 inputs for the CPU."""

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
    """Replace every wide linear layer of a module in place by its 8-bit form; return their number.

    Args:
        kind: `dynamic` or `weight_only`.

    Raises:
        ValueError: an unknown kind, or the device needs torchao and it is not installed.
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
