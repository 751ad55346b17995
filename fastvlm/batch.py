"""Sample and Batch: the only vocabulary that data and models share.

Shape letters, everywhere in this project:
    B rows of a batch     N patches of an image        D width (D_v vision, D_t text)
    S positions of a row  M visual tokens of an image  V vocabulary
    I views of a batch    T text tokens                H W pixels

An image is one view, or with tiles several: a global view and the tiles of a grid, row by row. Its slots are M for each
view, one view behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from fastvlm.tokens import IGNORE_INDEX


@dataclass
class Sample:
    """One conversation or document, encoded, its image slots already M tokens wide for each view.

    `labels[t]` is the token itself where it is learned and IGNORE_INDEX elsewhere; the loss shifts by one.
    """

    key: str
    source: str
    input_ids: np.ndarray  # int32 (T,)
    labels: np.ndarray  # likewise
    images: list[Tensor] = field(default_factory=list)  # views, uint8 (3, H, W), or their features (N, D); slot order
    label_maps: list[Tensor] = field(default_factory=list)  # uint8 (C, h, w), one an image, for dense labels
    layouts: list[tuple[int, int, int, int]] = field(default_factory=list)  # of its images: see Batch.layouts


@dataclass
class Batch:
    """Rows of packed (or single, padded) samples.

    segment_ids are 0 on padding and 1, 2, ... for the samples of a row; position_ids restart with every sample. Samples
    of a row never see each other: the model builds its block-diagonal causal mask from segment_ids.
    """

    input_ids: Tensor  # int64 (B, S)
    labels: Tensor  # int64 (B, S)
    position_ids: Tensor  # int64 (B, S)
    segment_ids: Tensor  # int64 (B, S)
    source_ids: Tensor  # int64 (B, S): index into `sources`, -1 on padding
    pixel_values: Tensor  # uint8 (I, 3, H, W), channels last in memory, row by row, left to right; I may be 0
    num_answer_tokens: int  # learned tokens of this optimiser step over all ranks and accumulated micro-batches
    sources: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    label_maps: Tensor | None = None  # uint8 (I, C, h, w)
    step: int = 0  # position in the plan: optimiser step
    skipped: tuple[str, ...] = ()  # keys that were planned here and could not be read
    layouts: Tensor | None = None  # int64 (images, 4): rows and columns of its tiles, height and width in pixels
    features: Tensor | None = None  # (I, N, D): the encoder's cached output in place of pixel_values, which is empty

    @property
    def num_images(self) -> int:
        return (self.pixel_values if self.features is None else self.features).shape[0]

    @property
    def num_tokens(self) -> int:
        """Positions that hold a token (not padding)."""
        return int((self.segment_ids > 0).sum())

    @property
    def num_learned(self) -> int:
        """Learned tokens of this very batch."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return Batch(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **moved})

    def pin_memory(self) -> Batch:
        moved = {f.name: v.pin_memory() for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return Batch(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **moved})
