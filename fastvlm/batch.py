"""Sample and Batch: the only types that the data and model code share.

Shape letters, used throughout this project:
    B rows of a batch     N patches of a view          D width (D_v vision, D_t text)
    S positions of a row  M visual tokens of a view    V vocabulary
    I views of a batch    T text tokens                H W pixels

An image is one view or, with tiling, several: a global view followed by the tiles of a grid, row by row. Each view
takes M consecutive slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from fastvlm.tokens import IGNORE_INDEX

NO_LABEL = 255  # in a label map: a cell, or a whole image, without dense labels


@dataclass
class Sample:
    """One tokenized conversation or document, in which every view already has its M image slots.

    `labels[t]` equals `input_ids[t]` where the token is learned and IGNORE_INDEX elsewhere; the loss shifts by one.
    """

    key: str
    source: str
    input_ids: np.ndarray  # int32 (T,)
    labels: np.ndarray  # int32 (T,)
    images: list[Tensor] = field(default_factory=list)  # views, uint8 (3, H, W), or their features (N, D); slot order
    label_maps: list[Tensor] = field(default_factory=list)  # uint8 (C, h, w), one per image, for dense labels
    layouts: list[tuple[int, int, int, int]] = field(default_factory=list)  # one per image, as in Batch.layouts


@dataclass
class Batch:
    """A batch of rows, each holding several packed samples or one padded sample.

    segment_ids are 0 on padding and 1, 2, ... for the samples of a row; position_ids restart with every sample. Samples
    in a row do not attend to each other: the model builds a block-diagonal causal mask from segment_ids.
    """

    input_ids: Tensor  # int64 (B, S)
    labels: Tensor  # int64 (B, S)
    position_ids: Tensor  # int64 (B, S)
    segment_ids: Tensor  # int64 (B, S)
    source_ids: Tensor  # int64 (B, S): index into `sources`, -1 on padding
    pixel_values: Tensor  # uint8 (I, 3, H, W), channels-last memory; views row by row, left to right; I may be 0
    num_answer_tokens: int  # learned tokens of the whole optimiser step, over all ranks and micro-batches
    sources: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    label_maps: Tensor | None = None  # uint8 (I, C, h, w)
    step: int = 0  # optimiser step, the batch's position in the plan
    skipped: tuple[str, ...] = ()  # keys of planned samples that could not be read
    layouts: Tensor | None = None  # int64 (images, 4): rows and columns of tiles, height and width in pixels
    features: Tensor | None = None  # (I, N, D): cached encoder output; pixel_values is then empty
    num_planned_images: int = 0  # views of the whole optimiser step, over all ranks and micro-batches

    @property
    def num_images(self) -> int:
        return (self.pixel_values if self.features is None else self.features).shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of positions that are not padding."""
        return int((self.segment_ids > 0).sum())

    @property
    def num_learned(self) -> int:
        """Number of learned tokens in this batch alone (unlike `num_answer_tokens`)."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return Batch(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **moved})

    def with_blank_image(self) -> Batch:
        """Return this batch, which has no image, with a blank one: not every encoder takes an empty batch."""
        blank = lambda images: images.new_zeros(1, *images.shape[1:])  # an empty tensor still has an image's shape
        features = None if self.features is None else blank(self.features)
        return replace(self, pixel_values=blank(self.pixel_values), features=features, layouts=None)

    def pin_memory(self) -> Batch:
        moved = {f.name: v.pin_memory() for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return Batch(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **moved})
