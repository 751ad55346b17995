"""Measure inference speed (time to first token, tokens per second) during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fastvlm.callbacks.metrics import Metrics


class AnswerSpeed(Callback):
    """Measures the model as a user would query it after each validation, and records the figures with `Metrics`.

    Rank 0 measures while the others wait for it at their next step; the time counts as validation, not as a training
    step. The model answers in eval mode and in the dtype of its weights (float32 under `bf16-mixed`). Weights, norm
    statistics, gradients, modes and random state are unchanged afterwards.

    Args:
        measure: maps the model to figures by name, such as `Speed.metrics` of `fastvlm.bench`.

    Raises:
        ValueError: (setup) there is no `Metrics` callback.
    """

    def __init__(self, measure: Callable[[Any], dict[str, float]]):
        self.measure = measure

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._metrics = next((c for c in trainer.callbacks if isinstance(c, Metrics)), None)
        if self._metrics is None:
            raise ValueError("AnswerSpeed needs the Metrics callback, which writes its figures")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        modes = [(module, module.training) for module in pl_module.modules()]
        cuda = [pl_module.device] if pl_module.device.type == "cuda" else []
        try:
            with torch.inference_mode(), torch.random.fork_rng(devices=cuda):
                figures = self.measure(getattr(pl_module, "model", pl_module))
        finally:
            for module, training in modes:
                module.training = training
                if hasattr(module, "take_auxiliary"):  # discard what the encoder recorded about these images
                    module.take_auxiliary()
        self._metrics.write(trainer, trainer.global_step, figures)
