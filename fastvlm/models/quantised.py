"""Frozen linear layers with weights in 8 or 4 bits, for training adapters on top of them (QLoRA)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# kind -> (library, bytes per weight, scales included).
KINDS = {
    "int8": ("bitsandbytes", 1.0),
    "nf4": ("bitsandbytes", 0.516),
    "fp4": ("bitsandbytes", 0.516),
    "torchao_int8": ("torchao", 1.0),
    "torchao_fp8": ("torchao", 1.0),
    "torchao_int4": ("torchao", 0.625),
}
GROUP = 64  # weights per scale and zero point in torchao_int4; its kernels support 32, 64 and 128


def library(kind: str, *, where: str = "quantise"):
    """Import and return the library that quantises `kind`.

    Raises:
        ValueError: `kind` is unknown, or its library is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"{where}={kind} is not one of {', '.join(KINDS)}")
    name = KINDS[kind][0]
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f"{where}={kind} needs {name}: pip install '.[quant]'") from None


class QuantisedLinear(nn.Module):
    """A linear layer with a frozen, quantised weight; the input's gradient is exact for that quantised weight.

    `int8`: rows scaled to int8, outlier features of the input (above 6) kept in 16 bits (LLM.int8, arXiv:2208.07339).
    `nf4`, `fp4`: blocks of 64 in four bits, their scales in eight (QLoRA, arXiv:2305.14314). Both by bitsandbytes.
    `torchao_int8`, `torchao_fp8`: one scale per row; inputs are not quantised.
    `torchao_int4`: groups of 64 with a scale and a zero point each (tinygemm), packed for the device's kernel.

    The codes are frozen parameters, so that they move with the module and `StageFreezing` checks them. They are not in
    checkpoints: the original weights are known, and quantisation is deterministic.

    bitsandbytes' own layer is not used. On a CPU with AVX512-BF16 its forward pass in eval mode repacks the weights
    permanently, after which layers without bias train with no gradient and no error. It also casts biases in place.
    """

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, linear.in_features, linear.out_features
        self.dtype, self.bias, self.state = linear.weight.dtype, linear.bias, None
        weight = linear.weight.detach()
        if kind == "int8":
            from bitsandbytes.functional import int8_vectorwise_quant

            codes, scale, _ = int8_vectorwise_quant(weight.half().contiguous())
            self.scale = nn.Parameter(scale, requires_grad=False)
        elif kind in ("nf4", "fp4"):
            from bitsandbytes.functional import quantize_4bit

            codes, self.state = quantize_4bit(weight.contiguous(), quant_type=kind, compress_statistics=True)
        elif kind == "torchao_int4":
            codes = int4_codes(weight)
        else:
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

            copy = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            copy.weight = nn.Parameter(weight, requires_grad=False)
            quantize_(copy, Int8WeightOnlyConfig() if kind == "torchao_int8" else Float8WeightOnlyConfig())
            codes = copy.weight.detach()
        self.codes = nn.Parameter(codes, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight (out, in) this layer computes with, in the dtype of the original layer."""
        if self.kind == "int8":
            return (self.codes.float() * (self.scale / 127)[:, None]).to(self.dtype)
        if self.state is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(self.codes.data, self.state).to(self.dtype)
        if self.kind == "torchao_int4":  # only its kernel can unpack the weight
            rows = torch.eye(self.in_features, dtype=self.codes.dtype, device=self.codes.device)
            return F.linear(rows, self.codes).T.to(self.dtype)
        return self.codes.dequantize().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.state is not None:
            from bitsandbytes import matmul_4bit

            y = matmul_4bit(x, self.codes, self.state)
        elif self.kind == "int8":
            from bitsandbytes import MatmulLtState, matmul

            state = MatmulLtState()
            state.CB, state.SCB = self.codes.data, self.scale.data
            # On a CPU is_training selects exact rather than quantised inputs; keep evaluation equal to training.
            state.has_fp16_weights, state.threshold, state.is_training = False, 6.0, True
            y = matmul(x, self.codes, state=state)
        elif self.kind == "torchao_int4":
            y = Int4Product.apply(x, self)
        else:
            return F.linear(x, self.codes, bias).to(x.dtype)
        return (y if bias is None else y + bias).to(x.dtype)

    def restore(self) -> nn.Linear:
        """Return a plain linear layer that computes the same function."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight.detach().clone(), requires_grad=False), self.bias
        return linear

    def _apply(self, fn, recurse: bool = True):
        if self.kind == "torchao_int4":
            device = fn(torch.empty(0, device=self.codes.device)).device
            if device.type not in (self.codes.device.type, "meta"):  # another device's kernel packs differently
                codes = int4_codes(self.weight.detach().to(device))
                self.codes = nn.Parameter(codes, requires_grad=False)
            if self.bias is not None:
                self.bias.data = fn(self.bias.data)
            return self
        super()._apply(fn, recurse)
        if self.state is not None:
            self.state.to(self.codes.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, errors):
        bias = state_dict.get(prefix + "bias")
        if bias is not None and self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)


class Int4Product(torch.autograd.Function):
    """x @ weight.T with torchao's kernel, which has no backward pass of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x.to(layer.codes.dtype), layer.codes).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def int4_codes(weight: Tensor) -> Tensor:
    """Quantise a weight to torchao's packed int4 format for its device.

    Raises:
        ValueError: torchao has no int4 kernel for the device.
    """
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    if weight.device.type == "cpu":
        try:
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig as Config
        except ImportError:
            raise ValueError(NO_INT4.format("on a CPU from 0.18 on")) from None
        config = Config(group_size=GROUP, set_inductor_config=False)
    else:
        if torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise ValueError(NO_INT4.format("for GPUs of compute capability 8.0 and above"))
        weight = weight.to(torch.bfloat16)
        config = Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, config)
    return linear.weight.detach()


NO_INT4 = "quantise=torchao_int4: torchao has its kernel {}; set nf4, which runs everywhere"


def fits_int4(linear: nn.Linear) -> bool:
    """Whether torchao's kernels support the layer's shape: whole groups, and a multiple of 16 outputs."""
    return linear.in_features % GROUP == 0 and linear.out_features % 16 == 0


def heads_of(module: nn.Module) -> list[nn.Module]:
    """Return the output head, if any; it is not quantised, because its errors would affect every logit."""
    hf = getattr(module, "hf", None)
    head = hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None
    return [] if head is None else [head]


def frozen_linears(module: nn.Module, *, keep: Iterable[nn.Module] = ()) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield (parent, attribute, layer) of every linear layer with a frozen, unshared weight.

    Skipped are modules of `keep` and their children, heads tied to an embedding, and children of
    `nn.MultiheadAttention`, which reads their weights without calling their forward.
    """
    shared: dict[int, int] = {}
    for one in module.modules():
        for parameter in one.parameters(recurse=False):
            shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    kept = {id(one) for part in keep for one in part.modules()}
    for parent in list(module.modules()):
        if isinstance(parent, nn.MultiheadAttention):
            continue
        for name, child in list(parent.named_children()):
            plain = type(child) is nn.Linear and id(child) not in kept
            if plain and not child.weight.requires_grad and shared[id(child.weight)] == 1:
                yield parent, name, child


def quantise(module: nn.Module, kind: str, *, keep: Iterable[nn.Module] = (), where: str = "quantise") -> int:
    """Replace the layers of `frozen_linears` that fit `kind` by `QuantisedLinear`; return the number of weights.

    Raises:
        ValueError: `kind` is unknown, its library is missing, or there is no layer to quantise.
    """
    library(kind, where=where)
    count = 0
    for parent, name, child in frozen_linears(module, keep=keep):
        if kind == "torchao_int4" and not fits_int4(child):
            continue
        setattr(parent, name, QuantisedLinear(child, kind))
        count += child.weight.numel()
    if not count:
        sized = f" of {GROUP} inputs or a multiple" if kind == "torchao_int4" else ""
        raise ValueError(f"{where}={kind}: there is no frozen linear layer{sized}; a part that learns whole has none")
    return count


def dequantise(module: nn.Module) -> None:
    """Replace every `QuantisedLinear` by a plain layer that computes the same."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLinear):
                setattr(parent, name, child.restore())


def quantised_layers(module: nn.Module) -> list[tuple[str, QuantisedLinear]]:
    return [(name, one) for name, one in module.named_modules() if isinstance(one, QuantisedLinear)]
