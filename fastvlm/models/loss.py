"""Cross-entropy of the learned tokens, with logits computed only where they are predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvlm.tokens import IGNORE_INDEX


class AnswerLoss(NamedTuple):
    """Loss of a batch: `sum` carries the gradient; `losses` (detached) and `index` have one entry per learned token.

    `index` is the learned token's position in the flattened batch, so `source_ids.flatten()[index]` is its source.
    """

    sum: Float[Tensor, ""]
    losses: Float[Tensor, "T"]
    index: Int[Tensor, "T"]


def answer_loss(
    hidden: Float[Tensor, "B S D"],
    labels: Int[Tensor, "B S"],
    head: Callable[[Tensor], Tensor],
    *,
    segment_ids: Int[Tensor, "B S"],
    chunk_tokens: int = 2048,
) -> AnswerLoss:
    """Sum -log p(label) over learned tokens, each predicted from the previous position of its own segment.

    A learned token at the start of a segment is not counted, because the previous position belongs to another sample.

    Args:
        head: maps hidden states to logits; called only on positions that predict a learned token.
        chunk_tokens: learned tokens whose logits are held at a time. With more of them, logits are recomputed in the
            backward pass, so memory stays at chunk_tokens x V.
    """
    learned = (labels[:, 1:] != IGNORE_INDEX) & (segment_ids[:, 1:] == segment_ids[:, :-1])
    index = F.pad(learned, (1, 0)).flatten().nonzero().squeeze(1)
    before = hidden.flatten(0, 1).index_select(0, index - 1)  # (T, D)
    targets = labels.flatten()[index]

    def chunk_losses(states: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), target, reduction="none")

    # Without learned tokens there is still one empty chunk, so that the head is in the graph on every rank.
    pieces = list(zip(before.split(chunk_tokens), targets.split(chunk_tokens)))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        losses = torch.cat([chunk_losses(*piece) for piece in pieces])
    else:
        losses = torch.cat([checkpoint(chunk_losses, *piece, use_reentrant=False) for piece in pieces])
    return AnswerLoss(losses.sum(), losses.detach(), index)


def sum_by_source(
    losses: Float[Tensor, "U"], source: Int[Tensor, "U"], *, num_sources: int
) -> tuple[Float[Tensor, "num_sources"], Float[Tensor, "num_sources"]]:
    """Return each source's summed loss and number of units (learned tokens, images, ...), float32 and detached."""
    losses = losses.detach().float()
    sums = losses.new_zeros(num_sources)
    counts = torch.zeros_like(sums)
    return sums.index_add(0, source, losses), counts.index_add(0, source, torch.ones_like(losses))
