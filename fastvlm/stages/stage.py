"""A stage: one training phase as a LightningModule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fastvlm.batch import Batch
from fastvlm.models.loss import sum_by_source
from fastvlm.models.sharding import gather, shard, share_statistics
from fastvlm.models.trainable import set_mode


def learning_rate_factor(
    step: int, *, num_steps: int, warmup_steps: int, decay: str, final: float, decay_steps: int | None = None
) -> float:
    """Return the factor on the peak learning rate at a step, counted from 0: linear warm-up, then `decay`.

    `cosine`, `linear`: decay to `final` over the remaining steps.
    `constant`: stay at the peak.
    `wsd`, `wsd_sqrt`: stay at the peak, then decay to `final` over the last `decay_steps` (None: a fifth of the
        stage), linearly or as 1 - sqrt(progress). Hu et al., arXiv:2404.06395, section 4; Haegele et al.,
        arXiv:2405.18392.

    Raises:
        ValueError: `decay` is unknown.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    begin = warmup_steps
    if decay.startswith("wsd"):
        begin = max(warmup_steps, num_steps - (num_steps // 5 if decay_steps is None else decay_steps))
    progress = min(1.0, max(0, step - begin) / max(1, num_steps - begin))
    if decay == "cosine":
        shape = (1 + math.cos(math.pi * progress)) / 2
    elif decay == "wsd_sqrt":
        shape = 1 - math.sqrt(progress)
    elif decay in ("linear", "wsd"):
        shape = 1 - progress
    elif decay == "constant":
        shape = 1.0
    else:
        raise ValueError(f"decay={decay} is not one of cosine, linear, constant, wsd, wsd_sqrt")
    return final + (1 - final) * shape


class Stage(L.LightningModule):
    """Base class of stages: optimises the trainable parameters, runs the schedule, keeps frozen parts in eval mode.

    Before the optimiser is created, the StageFreezing callback fills in `learning_rates` (parameter name -> peak rate)
    and `learning_settings`, which may add `weight_decay` and `warmup_steps` of single parameters; without
    `learning_rates` the stage refuses to create an optimiser. Subclasses define the loss in `objective`.

    Args:
        model: the VLM.
        name: the stage's key in `stages`.
        num_steps: optimiser steps of the whole stage.
        optimizer: factory called with parameter groups.
        warmup_steps, decay, final, decay_steps: see `learning_rate_factor`.
        seed: with stage name and step, seeds each step's randomness (dropout, noise), so that a resumed run repeats it.
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
        decay_steps: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.name, self.num_steps, self.seed = model, name, num_steps, seed
        self.make_optimizer = optimizer
        self.schedule = dict(
            num_steps=num_steps, warmup_steps=warmup_steps, decay=decay, final=final, decay_steps=decay_steps
        )
        self.learning_rates: dict[str, float] = {}
        self.learning_settings: dict[str, dict[str, float]] = {}
        self.whole: list[nn.Module] = []  # the unsharded model while a sharded copy trains; a list is not registered

    def configure_model(self) -> None:
        """Under FSDP2 or DeepSpeed, train a sharded copy, from which `gather_weights` updates the model.

        FSDP2 is applied here; DeepSpeed shards the copy itself when the optimiser is created.
        """
        if self.whole or (self.device_mesh is None and not self.by_deepspeed):
            return
        self.whole.append(self.model.to("cpu"))
        self.model = copy.deepcopy(self.model)
        if self.by_deepspeed:
            return
        shard(
            self,
            self.device_mesh["data_parallel"],
            parts=self.model.parts,
            methods=("training_step", "validation_step"),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning numbers the optimiser's state in another way; DeepSpeed's checkpoints are folders.
        if self.whole and not self.by_deepspeed:
            checkpoint["strategy"] = "fsdp"

    @property
    def by_deepspeed(self) -> bool:
        return self._trainer is not None and getattr(self._trainer.strategy, "zero_stage_3", False)

    def on_train_end(self) -> None:
        if self.by_deepspeed:  # before teardown moves the shards to the CPU, where they cannot be gathered
            self.gather_weights()

    def gather_weights(self) -> None:
        """Gather trained weights into the unsharded model, if a sharded copy was trained. Every rank must call this."""
        if self.whole:
            gather(self.model, self.whole[0])
            self.model = self.whole.pop()

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Compute the summed loss and the denominator of the whole optimiser step (all ranks and micro-batches).

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
        settings = {name: self.learning_settings.get(name, {}) for name in named}
        rows = [(p, self.learning_rates[name], name.split(".")[0], settings[name]) for name, p in named.items()]
        rows += [(p, max(self.learning_rates.values()), "head", {}) for p in self.head_parameters()]
        groups: dict[tuple, list[nn.Parameter]] = {}
        for parameter, rate, part, own in rows:
            matrix = parameter.ndim == 2 and id(parameter) not in tables and part != "head"
            kind = "matrix" if matrix else "table" if parameter.ndim >= 2 else "vector"
            # No weight decay on vectors (biases, norms and scales), as in nanoGPT and timm.
            decay = 0.0 if kind == "vector" else own.get("weight_decay")
            groups.setdefault((part, rate, kind, decay, own.get("warmup_steps")), []).append(parameter)
        optimizer = self.make_optimizer(
            [
                {"params": p, "lr": rate, "name": part, "kind": kind}
                | ({} if decay is None else {"weight_decay": decay})
                for (part, rate, kind, decay, _), p in groups.items()
            ]
        )
        schedules = [
            partial(learning_rate_factor, **self.schedule | ({} if warmup is None else {"warmup_steps": warmup}))
            for *_, warmup in groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def head_parameters(self) -> list[nn.Parameter]:
        """Return parameters of the objective itself, which are trained but not part of the handoff."""
        return [p for name, p in self.named_parameters() if not name.startswith("model.")]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.whole:
            share_statistics(self.model)
        torch.manual_seed((self.seed * 1_000_003 + self.name_seed) % 2**31 + batch_idx)

    @property
    def name_seed(self) -> int:
        return sum(ord(c) * 31**i for i, c in enumerate(self.name)) % 65_521

    def training_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        out = self.measure(batch)
        # DDP averages gradients over ranks and Lightning divides by the accumulated micro-batches; the denominator
        # already counts all of them, so both are undone here.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches if self._trainer is not None else 1
        if self.by_deepspeed:  # DeepSpeed divides by the accumulated micro-batches once more
            scale *= self.trainer.accumulate_grad_batches
        out["loss"] = out["loss"] * scale
        return out

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        return self.measure(batch)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        loss_sum, denominator, losses, extra = self.objective(batch)
        source_loss, source_tokens = sum_by_source(losses, extra["source"], num_sources=len(batch.sources))
        out = {
            "loss": loss_sum / denominator,
            "loss_sum": loss_sum.detach(),
            "source_loss": source_loss,
            "source_tokens": source_tokens,
        }
        return out | {k: v for k, v in extra.items() if k != "source"}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)
