"""Inference optimisations ("levers") that can be switched on by name; `benchmarks/ttft.py` measures each.

    python -m fastvlm.bench run=runs/latest levers=fast
    python -m fastvlm.inference.server run=runs/latest levers=reparameterize,channels_last,bf16

Those marked "exact" in `LEVERS` change results only by rounding; the descriptions of the others say what they change.
"""

from __future__ import annotations

import ctypes
import difflib
import platform
from collections.abc import Sequence

import torch
import torch._inductor.config as inductor
from torch import nn

from fastvlm.inference.depthwise import is_widening, split_depthwise
from fastvlm.inference.fast_decoder import fits
from fastvlm.inference.int8 import KINDS, SMALLEST, is_wide_linear, quantise_linears
from fastvlm.inference.packed import SMALLEST as SMALLEST_PACKED
from fastvlm.inference.packed import is_packable, pack_linears
from fastvlm.inference.products import use_products
from fastvlm.models.vlm import VLM

LEVERS = {
    "reparameterize": "encoder: parallel branches and norms folded into single convolutions (exact)",
    "channels_last": "encoder: convolutions see channels last in memory (exact)",
    "depthwise": "encoder: convolutions that make several maps of a channel as several that make one (exact; CPU)",
    "bf16": "all parts in bfloat16; with int8_dynamic the language model's activations stay float32 outside attention",
    "int8_dynamic": "language model: linear layers with 8-bit weights and rows rounded to 8 bits, each by itself",
    "int8_weight_only": "language model: linear layers with 8-bit weights",
    "packed": "linear layers that are left laid out once for the products that read them (exact; CPU)",
    "graphs": "decoding: a token is one CUDA graph over keys and values that do not move (exact; CUDA)",
    "keep_memory": "freed memory stays with the process, so that it need not be cleared again (exact; CPU with glibc)",
    "compile": "encoder: torch.compile, weights frozen (held twice on a CPU); the first image of a size waits for it",
}
# Levers that help without waiting for a compiler; on a CPU as measured by benchmarks/ttft.py. 8-bit pointwise
# convolutions in the encoder were tried and did not help: FBGEMM writes float32, and bf16 ones were 1.3 times faster.
FAST = {
    "cpu": ("reparameterize", "channels_last", "depthwise", "bf16", "int8_dynamic", "keep_memory"),
    "cuda": ("reparameterize", "channels_last", "bf16"),
}


def parse_levers(text: str | Sequence[str] | None, *, device: str = "cpu") -> tuple[str, ...]:
    """Return lever names from a comma-separated list; `fast` expands to those of `FAST` for the device, `none` to none.

    Raises:
        ValueError: an unknown lever, or two that exclude each other.
    """
    names = text.split(",") if isinstance(text, str) else list(text or ())
    names = [name.strip() for name in names if name.strip() not in ("", "none")]
    kind = torch.device(device).type
    names = [n for name in names for n in (FAST.get(kind, FAST["cuda"]) if name == "fast" else (name,))]
    for name in names:
        if name not in LEVERS:
            near = difflib.get_close_matches(name, LEVERS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LEVERS)}"
            raise ValueError(f"levers={name} is not a lever: {hint}")
    if {"int8_dynamic", "int8_weight_only"} <= set(names):
        raise ValueError("levers: int8_dynamic and int8_weight_only exclude each other; name one")
    return tuple(dict.fromkeys(names))


@torch.no_grad()
def apply_levers(model: VLM, levers: str | Sequence[str] | None) -> tuple[str, ...]:
    """Apply levers to a model in place and return their names. The model can then only be used for inference.

    `fast` skips levers that would have no effect on this model.

    Raises:
        ValueError: see `parse_levers`; a lever named explicitly would have no effect.
    """
    device = next(model.parameters()).device
    names = parse_levers(levers, device=str(device))
    asked = {n.strip() for n in (levers.split(",") if isinstance(levers, str) else levers or ())}
    idle = {name: why for name in names if (why := nothing_to_do(model, name))}
    for name, why in idle.items():
        if name in asked:
            raise ValueError(f"levers={name}: {why}")
    names = tuple(name for name in names if name not in idle)
    model.eval().requires_grad_(False)
    if "reparameterize" in names:
        model.encoder.reparameterize()
    if "depthwise" in names:
        split_depthwise(model.encoder)
    if "bf16" in names:
        for part in (model.encoder, model.resampler, model.projector):
            part.to(torch.bfloat16)
        if "int8_dynamic" not in names or device.type != "cpu":
            model.llm.to(torch.bfloat16)
        model.llm.attention_dtype = torch.bfloat16
        if device.type == "cpu":
            use_products(model.encoder)
    if "channels_last" in names:
        model.encoder.to(memory_format=torch.channels_last)
    for kind in KINDS:
        if f"int8_{kind}" in names:
            quantise_linears(model.llm, kind=kind)
    if "packed" in names:
        # torch.compile treats the encoder's weights as constants and packs them itself.
        for part in (model.resampler, model.projector, model.llm, *(() if "compile" in names else (model.encoder,))):
            pack_linears(part)
    if "graphs" in names:
        model.llm.graphs = True  # read by Engine
    if "keep_memory" in names:
        keep_memory()
    if "compile" in names:
        compile_encoder(model)
    return names


def nothing_to_do(model: VLM, name: str) -> str:
    """Return the reason why a lever would have no effect on this model; empty if it would have one."""
    if name == "reparameterize" and not hasattr(model.encoder, "reparameterize"):
        return f"{type(model.encoder).__name__} has no branches to fold"
    if name == "depthwise" and next(model.parameters()).is_cuda:
        return "it is for kernels of a CPU"
    if name == "depthwise" and not any(map(is_widening, model.encoder.modules())):
        return f"{type(model.encoder).__name__} has no convolution that makes several maps of a channel"
    if name.startswith("int8") and not any(map(is_wide_linear, model.llm.modules())):
        return f"the language model has no linear layers of {SMALLEST} or wider"
    if name == "packed" and next(model.parameters()).is_cuda:
        return "its layout is for products on a CPU"
    if name == "packed" and not any(map(is_packable, model.modules())):
        return f"the model has no linear layers of {SMALLEST_PACKED:,} weights or more"
    if name == "graphs" and not next(model.parameters()).is_cuda:
        return "there are no graphs on a CPU"
    if name == "graphs" and not fits(model.llm):
        return f"{type(model.llm).__name__} is decoded by its own code, which allocates anew for each token"
    if name == "keep_memory" and (platform.libc_ver()[0] != "glibc" or next(model.parameters()).is_cuda):
        return "this is not a CPU under glibc"
    return ""


def keep_memory() -> None:
    """Stop glibc from returning freed memory: the kernel would zero the pages of large tensors again each time."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def compile_encoder(model: VLM) -> None:
    """Compile the encoder; on a CPU with its weights as constants, which lets kernels use their own weight layouts."""
    encoder = model.encoder
    compiled = torch.compile(encoder.forward, dynamic=False)
    if next(encoder.parameters()).device.type != "cpu":
        encoder.forward = compiled
        return

    def forward(*args, **kwargs):
        # Dynamo reads `freezing` from the global configuration; the same option of torch.compile does not reach it.
        with inductor.patch(freezing=True):
            return compiled(*args, **kwargs)

    def refuse(*_) -> None:
        raise ValueError(
            "levers=compile: the encoder's weights are constants of its compiled form; load them before it is pulled"
        )

    encoder.forward = forward
    encoder.register_load_state_dict_pre_hook(refuse)


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, packed ones included."""
    total = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if packed is not None:
            total += module.in_features * module.out_features * getattr(packed, "itemsize", 1)
    return total
