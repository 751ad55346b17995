"""A stage: one training phase as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import lightning as L
import torch
from torch import Tensor, nn

from fastvlm.batch import Batch
from fastvlm.models.trainable import set_mode


def learning_rate_factor(step: int, *, num_steps: int, warmup_steps: int, decay: str, final: float) -> float:
    """Linear warm-up, then `cosine` or `linear` decay to `final` of the peak, or `constant`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[decay]
    return final + (1 - final) * shape


class Stage(L.LightningModule):
    """What every stage shares: the optimiser over what learns, the schedule, and frozen parts kept in eval.

    `learning_rates` (parameter name -> peak rate) is filled in by the StageFreezing callback before the optimiser is
    made; without it nothing may learn. A subclass says what the loss is, in `objective`.

    Args:
        model: the VLM.
        name: the stage's key in `stages`.
        num_steps: optimiser steps of the whole stage.
        optimizer: called with parameter groups.
        warmup_steps, decay, final: see `learning_rate_factor`.
        seed: every step draws its randomness (dropout, noise) from (seed, step), so that a resumed run repeats it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        num_steps: int,
        optimizer: Callable[[Iterable], torch.optim.Optimizer],
        warmup_steps: int = 0,
        decay: str = "cosine",
        final: float = 0.1,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.name, self.num_steps, self.seed = model, name, num_steps, seed
        self.make_optimizer = optimizer
        self.schedule = dict(num_steps=num_steps, warmup_steps=warmup_steps, decay=decay, final=final)
        self.learning_rates: dict[str, float] = {}

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Loss sum, what it is divided by over all ranks and micro-batches, and its parts.

        Returns:
            (loss sum, denominator, per-unit losses (U,), {"source": (U,) source index of each unit, ...}).
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> Stage:
        self.training = mode
        for child in self.children():
            set_mode(child, mode)
        return self

    def configure_optimizers(self):
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        tables = {id(p) for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        tables |= {id(p) for name, p in named.items() if "lm_head" in name or "lora_" in name}
        if not self.learning_rates or set(named) != set(self.learning_rates):
            raise RuntimeError(f"stage {self.name}: the StageFreezing callback has not set what learns")
        named_rates = [(p, self.learning_rates[name], name.split(".")[0]) for name, p in named.items()]
        named_rates += [(p, max(self.learning_rates.values()), "head") for p in self.head_parameters()]
        groups: dict[tuple, list[nn.Parameter]] = {}
        for parameter, rate, part in named_rates:
            matrix = parameter.ndim == 2 and id(parameter) not in tables and part != "head"
            kind = "matrix" if matrix else "table" if parameter.ndim >= 2 else "vector"
            groups.setdefault((part, rate, kind), []).append(parameter)
        optimizer = self.make_optimizer(
            [
                # Biases, norms and scales are vectors: weight decay would only shrink them (as in nanoGPT, timm).
                {"params": p, "lr": rate, "name": part, "kind": kind}
                | ({"weight_decay": 0.0} if kind == "vector" else {})
                for (part, rate, kind), p in groups.items()
            ]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, **self.schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the objective itself; they learn with the stage and are not handed on."""
        return [p for name, p in self.named_parameters() if not name.startswith("model.")]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed((self.seed * 1_000_003 + self.name_seed) % 2**31 + batch_idx)

    @property
    def name_seed(self) -> int:
        return sum(ord(c) * 31**i for i, c in enumerate(self.name)) % 65_521

    def training_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        out = self.measure(batch)
        # DDP averages gradients over ranks and Lightning divides by the accumulated micro-batches; the denominator
        # already counts all of them, so both are undone here.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches if self._trainer is not None else 1
        out["loss"] = out["loss"] * scale
        return out

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        return self.measure(batch)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        loss_sum, denominator, losses, extra = self.objective(batch)
        source_loss = losses.new_zeros(len(batch.sources), dtype=torch.float32)
        source_tokens = torch.zeros_like(source_loss)
        source = extra["source"]
        source_loss.index_add_(0, source, losses.detach().float())
        source_tokens.index_add_(0, source, torch.ones_like(losses, dtype=torch.float32))
        out = {
            "loss": loss_sum / denominator,
            "loss_sum": loss_sum.detach(),
            "source_loss": source_loss,
            "source_tokens": source_tokens,
        }
        return out | {k: v for k, v in extra.items() if k != "source"}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)
