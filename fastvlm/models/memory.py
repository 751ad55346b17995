"""Estimate the memory a stage needs on one device from shapes alone, before it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fastvlm.models.quantised import KINDS, fits_int4, frozen_linears, heads_of
from fastvlm.models.vlm import VLM

GIB = 2**30
CHUNK = 2048  # learned tokens whose logits are held at a time: the default of `answer_loss`


@dataclass
class Memory:
    """Bytes on one device at a step's peak. Entries are summed, though not all are allocated at the same moment."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def largest(self) -> str:
        return max(fields(self), key=lambda f: getattr(self, f.name)).name

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name) / GIB:.2f}" for f in fields(self))
        return f"{self.total / GIB:.2f} GiB ({parts})"


def copy_with(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy the modules, replacing each parameter and buffer by `make(tensor)`; no tensor data is copied."""
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        other = make(tensor)
        if isinstance(tensor, nn.Parameter):
            other = nn.Parameter(other, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = other
    return copy.deepcopy(model, memo)


def shape_of(tensor: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def estimate(
    model: VLM,
    *,
    apply: Callable[[nn.Module], dict[str, float]],
    optimizer: Callable[[Iterable[dict]], torch.optim.Optimizer],
    rows: int,
    tokens: int,
    images: int,
    image_size: int,
    parts: Iterable[str],
    learned_tokens: int | None = None,
    quantised: Callable[[nn.Module, dict], dict[str, str]] = lambda model, rates: {},
    autocast: torch.dtype | None = None,
    shards: int = 1,
) -> Memory:
    """Estimate the memory of one optimiser step on one micro-batch.

    Activations are what autograd would save in a forward pass over fake tensors; temporary tensors inside a layer are
    not included. With sharding, weights, gradients and optimiser state are divided by the number of ranks; the one
    layer that is gathered at a time is not added.

    Args:
        apply: applies the stage's adapters to a copy of the model and returns parameter name -> learning rate.
        optimizer: the stage's optimiser factory, called with parameter groups.
        rows, tokens, images, image_size: the micro-batch's rows, positions per row, views, and pixels per side.
        parts: names of the parts the stage runs.
        learned_tokens: learned tokens of the micro-batch; None: all its positions.
        quantised: (model, rates) -> part -> kind in which its frozen linear layers will be held.
        autocast: dtype of mixed precision; None: off.
        shards: number of ranks that share the weights.
    """
    device = next(model.llm.parameters()).device
    if device.type == "meta":  # autocast does nothing there; fake tensors take no memory on any device
        device = torch.device("cpu")
    fake = copy_with(model, lambda tensor: shape_of(tensor, "meta"))
    rates = apply(fake)
    for name, parameter in fake.named_parameters():
        parameter.requires_grad_(name in rates)
    weights = sum(t.numel() * t.element_size() for t in (*fake.parameters(), *fake.buffers()))
    for part, kind in quantised(fake, rates).items():
        module = getattr(fake, part)
        for _, _, layer in frozen_linears(module, keep=heads_of(module)):
            if kind == "torchao_int4" and not fits_int4(layer):
                continue
            weights -= layer.weight.numel() * (layer.weight.element_size() - KINDS[kind][1])
    learning = [(name, p) for name, p in fake.named_parameters() if name in rates]
    gradients = sum(p.numel() * p.element_size() for _, p in learning)
    state = sum(p.numel() * bytes_a_number(optimizer, kind_of(name, p, fake)) for name, p in learning)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = copy_with(fake, lambda tensor: shape_of(tensor, device))
        activations = activation_bytes(fake, rows, tokens, images, image_size, set(parts), autocast)
    logits = 0.0
    if "llm" in parts:
        held = min(CHUNK, learned_tokens or rows * tokens)
        # The head's output, its float32 copy, the saved softmax and the gradient.
        logits = float(held * model.llm.vocab_size * (4 + 4 + 4 + (2 if autocast else 4)))
    return Memory(weights / shards, gradients / shards, state / shards, activations, logits)


def kind_of(name: str, parameter: Tensor, model: nn.Module) -> str:
    """Return "matrix", "table" or "vector", as `Stage.configure_optimizers` groups parameters."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    if parameter.ndim == 2 and id(parameter) not in tables and "lm_head" not in name and "lora_" not in name:
        return "matrix"
    return "table" if parameter.ndim >= 2 else "vector"


def bytes_a_number(optimizer: Callable, kind: str, _known: dict = {}) -> float:  # noqa: B006
    """Return the bytes of optimiser state per parameter, measured by one step on a 128 x 128 stand-in."""
    key = (repr(optimizer), kind)
    if key not in _known:
        stand_in = nn.Parameter(torch.zeros(128, 128) if kind != "vector" else torch.zeros(128))
        stand_in.grad = torch.ones_like(stand_in)
        made = optimizer([{"params": [stand_in], "lr": 1e-3, "kind": kind, "name": "stand-in"}])
        made.step()
        # Keep state of the parameter's shape or of a row or column of it; constant tables do not grow with it.
        held = [v for v in made.state[stand_in].values() if torch.is_tensor(v) and v.ndim]
        held = [v for v in held if v.numel() * 128 >= stand_in.numel()]
        held = [v for v in held if v.numel() != 256]  # bitsandbytes' code books
        _known[key] = sum(v.numel() * v.element_size() for v in held) / stand_in.numel()
    return _known[key]


def activation_bytes(
    model: VLM, rows: int, tokens: int, images: int, image_size: int, parts: set[str], autocast: torch.dtype | None
) -> float:
    """Return the bytes autograd saves in one forward pass: each storage once, without the weights."""
    own = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, object] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage  # keep a reference, so that its id is not reused
        return tensor

    device = next(model.llm.parameters()).device
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        visual = None
        if "encoder" in parts and images:
            pixels = torch.zeros(images, 3, image_size, image_size, dtype=torch.uint8, device=device)
            visual = model.encode_images(pixels) if "llm" in parts else model.encode_patches(pixels)
        if "llm" in parts:
            text = model.llm.embed(torch.zeros(rows, tokens, dtype=torch.long, device=device))
            if visual is not None:
                # As in `splice`, at arbitrary positions: fake tensors have no ids to search.
                slots = torch.arange(min(visual.shape[0] * visual.shape[1], rows * tokens), device=device)
                flat = text.reshape(rows * tokens, -1)
                text = flat.index_copy(0, slots, visual.flatten(0, 1)[: len(slots)].to(flat.dtype)).view_as(text)
            segments = torch.ones(rows, tokens, dtype=torch.long, device=device)
            model.llm.hidden(text, segments.cumsum(1) - 1, segments)
    return float(sum(storage.nbytes() for storage in kept.values()))
