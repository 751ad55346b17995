"""Cost of a stage: FLOPs (extrapolated from one forward pass of each part), memory held, and time per step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvlm.models.flops import meta_twin
from fastvlm.models.quantised import quantised_layers


@dataclass
class ForwardFlops:
    """FLOPs of a forward pass, counted by torch's FlopCounterMode.

    A multiply-add is two FLOPs; matrix products and convolutions count, norms and activations do not. `view[part]` is
    per view; a row of S positions costs `linear * S + square * S**2`, and the logits of one position cost `head`.
    """

    view: dict[str, float]
    linear: float
    square: float
    head: float

    def rows(self, lengths: np.ndarray, rows: int) -> float:
        """Return the FLOPs of `rows` rows at each of the padded `lengths`, without logits."""
        lengths = lengths.astype(np.float64)
        return float(rows * (self.linear * lengths + self.square * lengths**2).sum())


@torch.no_grad()
def count_forward(model: nn.Module, *, parts: list[str], image_size: int, length: int) -> ForwardFlops:
    """Count the FLOPs of a VLM's forward pass; the model is unchanged afterwards.

    Args:
        parts: names of the parts the stage runs.
        image_size: side of a view in pixels.
        length: typical number of positions per row; counts at two lengths give the linear and the quadratic term.
    """
    modes = [(module, module.training) for module in model.modules()]
    learning = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    # FlopCounterMode's hooks expect a graph behind tensors that require gradients; views made under no_grad have none.
    model.requires_grad_(False)
    try:
        view: dict[str, float] = {}
        if "encoder" in parts:
            parameter = next(model.encoder.parameters())
            x = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
            for name in ("encoder", "resampler", "projector"):
                if name in parts:
                    view[name], x = _count(getattr(model, name), x)
        linear = square = head = 0.0
        if "llm" in parts:
            small, large = max(8, length // 2), max(16, length)
            twin = meta_twin(model.llm)  # a real row of a large one takes minutes on a CPU
            twin.attention = "eager"  # the others count as many operations, but not all of them run on shapes alone
            at_small, at_large = (_count_row(twin, n) for n in (small, large))
            square = (at_large / large - at_small / small) / (large - small)
            linear = at_large / large - square * large
            head = 2.0 * model.llm.dim * model.llm.vocab_size
    finally:
        for module, training in modes:
            module.training = training
        for parameter in learning:
            parameter.requires_grad_(True)
    return ForwardFlops(view, linear, square, head)


def _count(part: nn.Module, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    with FlopCounterMode(display=False) as counter:
        y = part(x)
    return float(counter.get_total_flops()), y


def _count_row(llm: nn.Module, length: int) -> float:
    parameter = next(llm.parameters())
    embeds = torch.zeros(1, length, llm.dim, device=parameter.device, dtype=parameter.dtype)
    positions = torch.arange(length, device=parameter.device)[None]
    with FlopCounterMode(display=False) as counter:
        llm.hidden(embeds, positions, torch.ones_like(positions))
    return float(counter.get_total_flops())


def learned_shares(model: nn.Module) -> dict[str, float]:
    """Return the share of each part's parameters that currently require gradients."""
    shares = {}
    for name, part in model.parts.items():
        counts = [(p.numel(), p.requires_grad) for p in part.parameters()]
        shares[name] = sum(n for n, learns in counts if learns) / max(1, sum(n for n, _ in counts))
    return shares


def training_flops(
    forward: ForwardFlops, learned: dict[str, float], *, lengths: np.ndarray, rows: int, views: int, logits: int
) -> float:
    """Return a stage's FLOPs: forward pass, activation gradients and weight gradients.

    A part's weight gradients cost its forward pass times its trainable share. Its activation gradients cost the forward
    pass if an earlier part is trained, otherwise that share again. A frozen encoder is counted in every step, even if
    its outputs are cached.

    Args:
        learned: trainable share of each part.
        lengths: padded row length of every step.
        rows: rows per step.
        views: views in all steps.
        logits: positions in all steps whose logits are computed.
    """
    total, before = 0.0, False
    costs = {name: flops * views for name, flops in forward.view.items()}
    if forward.linear:
        costs["llm"] = forward.rows(lengths, rows) + forward.head * logits
    for name, flops in costs.items():
        share = learned.get(name, 0.0)
        total += flops * (1 + share + (1 if before else share))
        before = before or share > 0
    return total


def stage_cost(forward: ForwardFlops, learned: dict[str, float], plan) -> dict[str, float]:
    """Return the `cost/...` metrics of a stage with this plan: steps, tokens (without padding), views, FLOPs."""
    tokens, images = plan.row_sizes()  # (steps, rows of a step)
    num_tokens, num_views = int(tokens.sum()), int(images.sum())
    flops = training_flops(
        forward,
        learned,
        lengths=tokens.max(axis=1),
        rows=tokens.shape[1],
        views=num_views,
        logits=num_learned(plan),
    )
    return {
        "cost/steps": float(tokens.shape[0]),
        "cost/tokens": float(num_tokens),
        "cost/views": float(num_views),
        "cost/flops": flops,
    }


def num_learned(plan) -> int:
    """Return the number of learned tokens in all steps."""
    return int(plan.costs(plan.num_samples, "answer_tokens")[1].sum()) if plan.num_samples else 0


def held_bytes(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> int:
    """Return the bytes a stage holds between steps: weights, buffers, optimiser state and gradients.

    Quantised weights count as codes and scales. Activations and allocator overhead are not included, so the number is
    the same on every machine.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for _, layer in quantised_layers(model) if layer.state is not None for t in scales(layer.state)]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    inner = {t.data_ptr(): t for tensor in tensors for t in plain(tensor)}  # layers share a code book
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(t.numel() * t.element_size() for t in inner.values()) + gradients


def scales(state) -> Iterator[Tensor]:
    """Yield the tensors of bitsandbytes' 4-bit quantisation state, whose scales are themselves quantised."""
    yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor))
    if state.state2 is not None:
        yield from scales(state.state2)


def plain(tensor: Tensor) -> list[Tensor]:
    """Return the inner tensors of a tensor subclass (torchao's codes and scales, a rank's shard), or the tensor."""
    tensor = tensor.detach()
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [part for one in inner if isinstance(one, Tensor) for part in plain(one)]


class StepClock(L.Callback):
    """Measures the median milliseconds of an optimiser step, without waiting for data, as `step_ms`.

    On a CPU this is process time, which mostly excludes other processes' load; elsewhere it is wall-clock time. The
    first step is not counted.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._mark = self._sum = 0.0

    def on_train_batch_start(self, trainer, stage, batch, batch_idx) -> None:
        self._mark = self._now(stage)

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx) -> None:
        self._sum += self._now(stage) - self._mark
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.steps.append(self._sum * 1e3)
            self._sum = 0.0

    @property
    def step_ms(self) -> float:
        return median(self.steps[1:] or self.steps or [0.0])

    @staticmethod
    def _now(stage: L.LightningModule) -> float:
        return time.process_time() if stage.device.type == "cpu" else time.perf_counter()
