"""A pretrained vision-language model as a `VLM` of four parts, with its own way of joining them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fastvlm.models.llms.language_model import LanguageModel
from fastvlm.models.pretrained.connectors import Arrangement
from fastvlm.models.pretrained.language import PrefixLanguageModel, image_positions, prefix_of
from fastvlm.models.vlm import VLM, Layouts
from fastvlm.tokens import IGNORE_INDEX


class PretrainedVLM(VLM):
    """A pretrained model that freezing, LoRA, stages, handoff, generation and evaluation treat like any `VLM`.

    Args:
        arrangement: maps the visual tokens of an image's views to one sequence; None: concatenate the views.
        image_axes: whether images have positions on three axes (M-RoPE), as wide as their grid of visual tokens.
        config: the model's own configuration.
        restore: returns the model in its own class, for saving; this VLM must not be used afterwards.
    """

    def __init__(
        self,
        encoder: nn.Module,
        resampler: nn.Module,
        projector: nn.Module,
        llm: LanguageModel,
        *,
        image_token_id: int,
        arrangement: Arrangement | None = None,
        image_axes: bool = False,
        config: Any = None,
        restore: Callable[[PretrainedVLM], nn.Module] | None = None,
    ):
        super().__init__(encoder, resampler, projector, llm, image_token_id=image_token_id)
        self.arrangement, self.image_axes, self.config = arrangement, image_axes, config
        self._restore = restore

    @property
    def vision_dtype(self) -> torch.dtype:
        part = self.projector if any(True for _ in self.projector.parameters()) else self.encoder
        return next(part.parameters()).dtype

    @property
    def drops_tokens(self) -> bool:
        return self.arrangement is not None

    def num_visual_tokens(self, image_size: int) -> int:
        tokens = super().num_visual_tokens(image_size)
        return tokens if self.arrangement is None else self.arrangement.slots(tokens)

    def arrange(self, visual: Float[Tensor, "I m _"], layouts: Layouts = None) -> Float[Tensor, "I M D"]:
        """Put every image's sequence into the last slots of its views; the slots before it are zero.

        The last slot must hold a token, because the text after the image is predicted from it.

        Raises:
            ValueError: the layouts do not match the number of views.
        """
        if self.arrangement is None:
            return visual
        rows = [None] * len(visual) if layouts is None else [tuple(row) for row in layouts.tolist()]
        counts = [1 if row is None or row[0] * row[1] == 1 else 1 + row[0] * row[1] for row in rows]
        if sum(counts) != len(visual):
            raise ValueError(
                f"{len(visual)} views came with layouts of {sum(counts)}: views of one image need the layout that "
                "ImageTransform gives them"
            )
        slots, out = self.arrangement.slots(visual.shape[1]), []
        for views, row in zip(visual.split(counts), rows):
            sequence = self.arrangement(views, row)
            out.append(F.pad(sequence, (0, 0, slots * len(views) - len(sequence), 0)).unflatten(0, (len(views), slots)))
        return torch.cat(out) if out else visual.new_zeros(0, slots, visual.shape[2])

    def read(
        self,
        embeds: Float[Tensor, "B S D"],
        input_ids: Int[Tensor, "B S"],
        labels: Int[Tensor, "B S"],
        position_ids: Int[Tensor, "B S"],
        segment_ids: Int[Tensor, "B S"],
    ) -> Float[Tensor, "B S D"]:
        if isinstance(self.llm, PrefixLanguageModel):
            prefix = prefix_of(labels, segment_ids, IGNORE_INDEX)
            return self.llm.hidden_with_prefix(embeds, position_ids, segment_ids, prefix)
        if self.image_axes:
            return self.llm.hidden(embeds, self.positions(input_ids, position_ids), segment_ids)
        return super().read(embeds, input_ids, labels, position_ids, segment_ids)

    def positions(self, input_ids: Int[Tensor, "B S"], position_ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L *axes"]:
        if not self.image_axes:
            return position_ids
        is_slot = input_ids == self.image_token_id
        return image_positions(position_ids, is_slot, position_ids == 0, side=side_of_images(is_slot))

    def save_pretrained(self, folder: str | Path, **views) -> None:
        """Save the model in its own class, without its processor; this VLM must not be used afterwards."""
        self.restored().save_pretrained(folder)

    def restored(self) -> nn.Module:
        """Return the model in its own class, with the current weights."""
        return self._restore(self)


def side_of_images(is_slot: Bool[Tensor, "B S"]) -> int:
    """Return the side of the grid of visual tokens, where every run of slots is one square image.

    Raises:
        ValueError: the runs are not squares of one size.
    """
    first = is_slot & ~F.pad(is_slot, (1, 0))[:, :-1]
    runs, slots = int(first.sum()), int(is_slot.sum())
    side = math.isqrt(slots // max(1, runs))
    if runs * side**2 != slots:
        raise ValueError(
            f"{slots} image slots in {runs} runs are no equal squares: this model takes an image whole "
            "(image.tiles=null) and needs its own template, whose tokens stand between images (tokenizer.template=own)"
        )
    return max(1, side)
