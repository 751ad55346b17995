"""Try the largest batches early: memory runs out in the first minute or never."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import lightning as L
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int

from fastvlm.batch import Batch
from fastvlm.tokens import IGNORE_INDEX

MOST = 8  # batches that are tried
PADDING = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0, "segment_ids": 0, "source_ids": -1}


@dataclass(frozen=True)
class Slice:
    """What one rank holds at a time: the rows of a micro-batch, padded to `width` positions, and their images."""

    step: int
    micro: int
    rank: int
    width: int
    images: int


class LongestFirst(L.Callback):
    """After the first optimiser step, when its state is in memory too, the largest batches of the plan go forward and
    backward once. No weight, statistic or gradient is different afterwards, and every step draws its own randomness.

    No batch of the plan has both more positions and more images than one that is tried.

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
        tokens, images = self.plan.row_sizes()
        for one in largest_slices(tokens, images, ranks=trainer.world_size, accumulate=trainer.accumulate_grad_batches):
            batch = dataset[one.step * trainer.accumulate_grad_batches + one.micro]
            if trainer.global_rank == one.rank:  # the others go along with what they hold in the same step
                batch = widened(batch, one.width)
            self.rehearse(trainer, stage, batch)
            size = f"{len(batch.input_ids)} rows of {one.width} positions, {one.images} images"
            self.say(f"  step {one.step} tried first: {size}")
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


def widened(batch: Batch, width: int) -> Batch:
    """The batch with padding up to so many positions."""
    more = (0, max(0, width - batch.input_ids.shape[1]))
    pad = torch.nn.functional.pad
    return replace(batch, **{name: pad(getattr(batch, name), more, value=value) for name, value in PADDING.items()})


def largest_slices(
    tokens: Int[np.ndarray, "steps rows"], images: Int[np.ndarray, "steps rows"], *, ranks: int, accumulate: int
) -> list[Slice]:
    """Slices of which one is at least as large, in positions and in images, as any slice of the plan; widest first.

    They are the plan's own where at most MOST of them are larger than all others. Else neighbours are put together as
    one of the greater width with the images of the other, where that adds the least.

    Args:
        tokens, images: of every row, without padding: `Plan.row_sizes`.
    """
    cut = {"pattern": "steps (k micro rank) -> steps micro rank k", "micro": accumulate, "rank": ranks}
    widths, images = (rearrange(column, **cut) for column in (tokens, images))
    widths, images = widths.max(axis=-1), images.sum(axis=-1)
    width, count = widths.ravel(), images.ravel()
    order = np.lexsort((-count, -width))  # by width, then images, from the largest
    most = np.maximum.accumulate(count[order])
    front = order[np.concatenate([[True], most[1:] > most[:-1]])]
    places = zip(*np.unravel_index(front, widths.shape), width[front], count[front])
    return merged([Slice(*map(int, place)) for place in places], most=MOST)


def merged(front: Sequence[Slice], *, most: int) -> list[Slice]:
    """At most `most` slices, each with the width of the first and the images of the last of some neighbours.

    Args:
        front: narrower and with more images from one to the next.
    """
    front = list(front)
    while len(front) > most:
        widest, fullest = max(1, front[0].width), max(1, front[-1].images)
        adds = [(a.width - b.width) / widest + (b.images - a.images) / fullest for a, b in zip(front, front[1:])]
        at = int(np.argmin(adds))
        front[at : at + 2] = [replace(front[at + 1], width=front[at].width)]
    return front
