"""The longest batch, tried early: memory runs out in the first minute or never."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import numpy as np
import torch


class LongestFirst(L.Callback):
    """After the first optimiser step, when its state is in memory too, the largest batches of the plan go forward and
    backward once. No weight, statistic or gradient is different afterwards, and every step draws its own randomness.

    Args:
        plan: the stage's order, a `fastvlm.data.plan.Plan`.
        say: is told what was tried.

    Raises:
        ValueError: a batch does not fit into memory; the message names it and the keys that make it smaller.
    """

    def __init__(self, plan, *, say: Callable[[str], None] = print):
        self.plan, self.say, self.done = plan, say, False

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        if self.done or (batch_idx + 1) % trainer.accumulate_grad_batches != 0:
            return
        self.done = True
        dataset = trainer.train_dataloader.dataset
        buffers = {name: b.detach().clone() for name, b in stage.named_buffers()}
        for number in longest_steps(self.plan):
            for micro in range(trainer.accumulate_grad_batches):
                batch = dataset[number * trainer.accumulate_grad_batches + micro]
                self.rehearse(trainer, stage, batch)
                rows, positions = batch.input_ids.shape
                size = f"{rows} rows of {positions} positions, {batch.num_images} images"
                self.say(f"  step {number} tried first: {size}")
        trainer.optimizers[0].zero_grad()
        for name, buffer in stage.named_buffers():
            buffer.data.copy_(buffers[name])

    def rehearse(self, trainer, stage, batch) -> None:
        """Forward and backward of one batch.

        Raises:
            ValueError: it does not fit into memory.
        """
        rows, positions = batch.input_ids.shape
        try:
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.train_step_context():
                loss = trainer.strategy.training_step(batch, 0)["loss"]
            trainer.strategy.backward(loss, None)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"stage {stage.name}: the longest batch (step {batch.step}: {rows} rows of {positions} positions, "
                f"{batch.num_images} images) does not fit into memory ({str(error).splitlines()[0]}); lower "
                f"stages.{stage.name}.max_tokens or .max_images, or raise hardware.accumulate"
            ) from None


def longest_steps(plan) -> list[int]:
    """The steps with the most positions (padding included) and with the most images."""
    tokens, images = plan.row_sizes()
    return sorted({int(np.argmax(tokens.max(axis=1))), int(np.argmax(images.sum(axis=1)))})
