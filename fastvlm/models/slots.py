"""Empty image slots, left where an image has fewer visual tokens than slots.

The data plan is made before pixels are read, so every view has M slots in its row. A slot whose embedding is exactly
zero is empty: training masks it and skips its position, generation removes it. Both give the logits of the row without
the slot.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def empty_slots(embeds: Float[Tensor, "B S D"], is_slot: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    return is_slot & (embeds == 0).all(dim=-1)


def hide(
    empty: Bool[Tensor, "B S"], position_ids: Int[Tensor, "B S"], segment_ids: Int[Tensor, "B S"]
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Return position and segment ids that make the model ignore the `empty` positions.

    Empty positions become padding (segment 0), and later positions of the same sample are renumbered.
    """
    before = empty.long().cumsum(dim=1) - empty.long()  # empty positions to the left, in the whole row
    # Positions restart at 0 in every sample, so index - position is the sample's start.
    start = torch.arange(empty.shape[1], device=empty.device) - position_ids
    position_ids = position_ids - (before - before.gather(1, start))
    return position_ids.masked_fill(empty, 0), segment_ids.masked_fill(empty, 0)


def take_out(
    empty: Bool[Tensor, "B S"], embeds: Float[Tensor, "B S D"], mask: Int[Tensor, "B S"]
) -> tuple[Float[Tensor, "B L D"], Int[Tensor, "B L"]]:
    """Remove empty positions; return embeddings and mask (1 on tokens, 0 on padding), padded on the left."""
    mask = mask * ~empty
    order = mask.argsort(dim=1, stable=True)[:, mask.shape[1] - int(mask.sum(dim=1).max()) :]
    return embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2])), mask.gather(1, order)
