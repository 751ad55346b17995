"""Try the largest batches first, so that a run that would run out of memory does so at once."""

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

MOST = 8  # largest number of batches tried
PADDING = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0, "segment_ids": 0, "source_ids": -1}


@dataclass(frozen=True)
class Slice:
    """One rank's share of a micro-batch: rows padded to `width` positions, and their number of views."""

    step: int
    micro: int
    rank: int
    width: int
    images: int


class LongestFirst(L.Callback):
    """Runs the plan's largest batches forward and backward once, after the first optimiser step.

    The optimiser state is then in memory, too. Weights, norm statistics and gradients are unchanged afterwards, and
    randomness is not affected, because every step seeds its own. Every batch of the plan has at most as many positions
    and at most as many views as one of those tried.

    Args:
        plan: the stage's order, a `fastvlm.data.plan.Plan`.
        say: called with a message about each batch tried.

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
            if trainer.global_rank == one.rank:  # the other ranks run their own rows of that step
                batch = widened(batch, one.width)
            self.rehearse(trainer, stage, batch)
            size = f"{len(batch.input_ids)} rows of {one.width} positions, {one.images} images"
            self.say(f"  step {one.step} tried first: {size}")
        trainer.optimizers[0].zero_grad()
        for name, buffer in stage.named_buffers():
            buffer.data.copy_(buffers[name])

    def rehearse(self, trainer, stage, batch) -> None:
        """Run one batch forward and backward.

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
    """Pad the batch to `width` positions."""
    more = (0, max(0, width - batch.input_ids.shape[1]))
    pad = torch.nn.functional.pad
    return replace(batch, **{name: pad(getattr(batch, name), more, value=value) for name, value in PADDING.items()})


def largest_slices(
    tokens: Int[np.ndarray, "steps rows"], images: Int[np.ndarray, "steps rows"], *, ranks: int, accumulate: int
) -> list[Slice]:
    """Return slices such that any slice of the plan is covered by one of them, widest first.

    A slice covers another that has no more positions and no more views. The plan's own slices are returned if at most
    MOST of them cover all others. Otherwise neighbours are merged into one with the greater width and the greater
    number of views, where that adds the least.

    Args:
        tokens, images: positions without padding and views of every row, from `Plan.row_sizes`.
        ranks: number of ranks.
        accumulate: micro-batches per optimiser step.
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
    """Merge neighbours until at most `most` remain, each as wide as its first and with the views of its last.

    Args:
        front: slices ordered by decreasing width and increasing number of views.
    """
    front = list(front)
    while len(front) > most:
        widest, fullest = max(1, front[0].width), max(1, front[-1].images)
        adds = [(a.width - b.width) / widest + (b.images - a.images) / fullest for a, b in zip(front, front[1:])]
        at = int(np.argmin(adds))
        front[at : at + 2] = [replace(front[at + 1], width=front[at].width)]
    return front
