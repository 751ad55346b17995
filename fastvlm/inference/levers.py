"""What makes a model answer faster: each lever by name, each measured by `benchmarks/ttft.py`.

    python -m fastvlm.bench run=runs/latest levers=fast
    python -m fastvlm.inference.server run=runs/latest levers=reparameterize,channels_last,bf16

`exact` ones change no number beyond rounding; the others say what they cost in their line of `LEVERS`.
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
# What pays without waiting for a compiler; on a CPU as benchmarks/ttft.py measures it. 8-bit pointwise convolutions in
# the encoder were tried there and do not pay: FBGEMM writes float32, and bf16 convolutions were 1.3 times faster.
FAST = {
    "cpu": ("reparameterize", "channels_last", "depthwise", "bf16", "int8_dynamic", "keep_memory"),
    "cuda": ("reparameterize", "channels_last", "bf16"),
}


def parse_levers(text: str | Sequence[str] | None, *, device: str = "cpu") -> tuple[str, ...]:
    """Names from a comma-separated list; `fast` stands for those that pay on the device, `none` for none.

    Raises:
        ValueError: a name that is no lever, or two that exclude each other.
    """
    names = text.split(",") if isinstance(text, str) else list(text or ())
    names = [name.strip() for name in names if name.strip() not in ("", "none")]
    kind = torch.device(device).type
    names = [n for name in names for n in (FAST.get(kind, FAST["cuda"]) if name == "fast" else (name,))]
    for name in names:
        if name not in LEVERS:
            near = difflib.get_close_matches(name, LEVERS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LEVERS)}"
            raise ValueError(f"levers={name} is no lever: {hint}")
    if {"int8_dynamic", "int8_weight_only"} <= set(names):
        raise ValueError("levers: int8_dynamic and int8_weight_only exclude each other; name one")
    return tuple(dict.fromkeys(names))


@torch.no_grad()
def apply_levers(model: VLM, levers: str | Sequence[str] | None) -> tuple[str, ...]:
    """Pull levers, in place; the model is for inference from then on. Returns their names.

    `fast` leaves out those that find nothing to do in this model.

    Raises:
        ValueError: see `parse_levers`; a lever named by itself that finds nothing to do.
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
        # A compiler with the encoder's weights as constants lays them out itself.
        for part in (model.resampler, model.projector, model.llm, *(() if "compile" in names else (model.encoder,))):
            pack_linears(part)
    if "graphs" in names:
        model.llm.graphs = True  # the engine's decoder asks
    if "keep_memory" in names:
        keep_memory()
    if "compile" in names:
        compile_encoder(model)
    return names


def nothing_to_do(model: VLM, name: str) -> str:
    """Why a lever would change nothing in this model; empty where it would."""
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
    """Ask glibc never to hand freed memory back: large tensors else come as pages that the kernel clears each time."""
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def compile_encoder(model: VLM) -> None:
    """`torch.compile` with weights as constants: they are laid out anew for the kernels that read them."""
    encoder = model.encoder
    compiled = torch.compile(encoder.forward, dynamic=False)
    if next(encoder.parameters()).device.type != "cpu":
        encoder.forward = compiled
        return

    def forward(*args, **kwargs):
        # Dynamo asks the configuration whether weights are constants; an option of torch.compile does not reach it.
        with inductor.patch(freezing=True):
            return compiled(*args, **kwargs)

    def refuse(*_) -> None:
        raise ValueError(
            "levers=compile: the encoder's weights are constants of its compiled form; load them before it is pulled"
        )

    encoder.forward = forward
    encoder.register_load_state_dict_pre_hook(refuse)


def count_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, packed ones included."""
    total = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if packed is not None:
            total += module.in_features * module.out_features * getattr(packed, "itemsize", 1)
    return total
