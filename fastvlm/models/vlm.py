"""The vision-language model: encoder -> resampler -> projector -> splice -> language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from fastvlm.batch import Batch
from fastvlm.models.fit import check_fit
from fastvlm.models.llms.language_model import LanguageModel
from fastvlm.models.norms import frozen_statistics
from fastvlm.models.pieces import is_shard
from fastvlm.models.slots import empty_slots, hide, take_out
from fastvlm.models.splice import splice

Layouts = Int[Tensor, "images 4"] | None


class ImageEncoding(NamedTuple):
    """The encoding of views: visual tokens as a sequence, and the encoder's patches as a map."""

    sequence: Float[Tensor, "I M D_t"]
    spatial: Float[Tensor, "I D_v h w"]


class VLM(nn.Module):
    """A vision-language model made of four exchangeable parts.

    pixel_values (I, 3, H, W) -> encoder -> patches (I, N, D_v; or cached) -> resampler -> visual tokens (I, M, D_v)
        -> projector -> (I, M, D_t) -> splice at every image slot of input_ids (B, S) -> llm -> logits (B, S, V)

    Args:
        encoder: maps normalised images to patches; has `out_dim`, `mean`, `std` and `num_patches(image_size)`.
        resampler: maps patches to visual tokens; has `num_tokens_out(num_patches)`. If its `drops_tokens` is true, an
            image may fill fewer slots: its tokens take the last ones and the slots before them are zero.
        projector: maps visual tokens to the width of the language model.
        llm: embeds ids, maps embeddings to hidden states, and hidden states to logits.
        image_token_id: the id that marks an image slot (`Tokenizer.image_id`).
    """

    def __init__(
        self,
        encoder: nn.Module,
        resampler: nn.Module,
        projector: nn.Module,
        llm: LanguageModel,
        *,
        image_token_id: int,
    ):
        super().__init__()
        check_fit(encoder, resampler, projector, llm)
        self.encoder, self.resampler, self.projector, self.llm = encoder, resampler, projector, llm
        self.image_token_id = image_token_id
        self.recipe: dict[str, dict] | None = None  # constructor calls of the parts; None if built by hand
        # Times 255, because pixels are transferred as uint8, a quarter of the bytes of float32.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (encoder.mean, encoder.std))
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in ("encoder", "resampler", "projector", "llm")}

    @property
    def drops_tokens(self) -> bool:
        """Whether an image may leave some of its slots empty."""
        return self._resampler_drops

    @property
    def _resampler_drops(self) -> bool:
        return any(getattr(part, "drops_tokens", False) for part in (self.encoder, self.resampler))

    def num_visual_tokens(self, image_size: int) -> int:
        return self.resampler.num_tokens_out(self.encoder.num_patches(image_size))

    @property
    def vision_dtype(self) -> torch.dtype:
        return next(self.projector.parameters()).dtype

    def normalise(self, pixel_values: UInt8[Tensor, "I 3 H W"]) -> Float[Tensor, "I 3 H W"]:
        return ((pixel_values - self.pixel_mean) / self.pixel_std).to(self.vision_dtype)

    def encode_patches(
        self, pixel_values: UInt8[Tensor, "I 3 H W"], is_tile: Bool[Tensor, "I"] | None = None
    ) -> Float[Tensor, "I N D"]:
        views = (is_tile,) if getattr(self.encoder, "reads_views", False) else ()
        return run(self.encoder, self.normalise(pixel_values), *views)

    def encode_images(
        self, pixel_values: UInt8[Tensor, "I 3 H W"], is_tile: Bool[Tensor, "I"] | None = None
    ) -> Float[Tensor, "I M D"]:
        return self.project(self.encode_patches(pixel_values, is_tile))

    def patches(self, batch: Batch) -> Float[Tensor, "I N D"]:
        """Return the encoder's output for the batch's views, from the feature cache where the batch carries it."""
        if batch.features is None:
            return self.encode_patches(batch.pixel_values, tiles_of(batch.layouts))
        return batch.features.to(self.vision_dtype)

    def project(self, patches: Float[Tensor, "I N D_v"]) -> Float[Tensor, "I M D_t"]:
        """Resample and project patches to visual tokens. Slots of dropped tokens are exactly zero."""
        tokens = run(self.resampler, patches)
        visual = run(self.projector, tokens)
        return visual * (tokens != 0).any(dim=-1, keepdim=True) if self._resampler_drops else visual

    def arrange(self, visual: Float[Tensor, "I m _"], layouts: Layouts = None) -> Float[Tensor, "I M D"]:
        """Arrange visual tokens as the language model reads them; here, unchanged.

        `PretrainedVLM` overrides this: some pretrained models add newline tokens between tiles, for example.

        Args:
            layouts: (rows, columns, height, width) of every image: its grid of tiles and its size in pixels. None:
                every view is an image of its own.
        """
        return visual

    def encode_image(self, pixel_values: UInt8[Tensor, "I 3 H W"]) -> ImageEncoding:
        """Return every view's visual tokens as a sequence and its patches as a map."""
        patches = self.encode_patches(pixel_values)
        height, width = self.encoder.grid(pixel_values.shape[-1])
        in_order = getattr(self.encoder, "in_order", lambda patches: patches)(patches)
        on_grid = in_order[:, -height * width :]  # drops a class token, which comes first and has no place in the map
        return ImageEncoding(self.project(patches), rearrange(on_grid, "i (h w) d -> i d h w", h=height, w=width))

    def encode_text(self, input_ids: Int[Tensor, "*B S"]) -> Float[Tensor, "*B S D"]:
        return self.llm.embed(input_ids)

    def embed(self, batch: Batch) -> Float[Tensor, "B S D"]:
        """Return the language model's input: text embeddings with visual tokens in the image slots."""
        text = self.llm.embed(batch.input_ids)
        if batch.num_images:
            visual = self.arrange(self.project(self.patches(batch)), batch.layouts)
        else:
            visual = text.new_zeros(0, 1, text.shape[-1])
            if self._must_touch_vision():
                text = text + self._zero_from_blank_image(batch)
        return splice(text, batch.input_ids, visual, image_token_id=self.image_token_id)

    def hidden(self, batch: Batch) -> Float[Tensor, "B S D"]:
        """Return the last hidden states. Samples packed into one row do not attend to each other."""
        rows = (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)
        return self.read(self.embed(batch), *rows)

    def read(
        self,
        embeds: Float[Tensor, "B S D"],
        input_ids: Int[Tensor, "B S"],
        labels: Int[Tensor, "B S"],
        position_ids: Int[Tensor, "B S"],
        segment_ids: Int[Tensor, "B S"],
    ) -> Float[Tensor, "B S D"]:
        """Return the last hidden states of rows whose visual tokens are already spliced in."""
        if self.drops_tokens:
            empty = empty_slots(embeds, input_ids == self.image_token_id)
            position_ids, segment_ids = hide(empty, position_ids, segment_ids)
        return self.llm.hidden(embeds, position_ids, segment_ids)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Int[Tensor, "B S"],
        pixel_values: UInt8[Tensor, "I 3 H W"] | None = None,
        *,
        layouts: Layouts = None,
        attention_mask: Int[Tensor, "B S"] | None = None,
        max_new_tokens: int = 32,
        stop_ids: Sequence[int] = (),
    ) -> Int[Tensor, "B T"]:
        """Decode greedily in a plain loop and return the new tokens. `inference.Engine` adds sampling and text I/O.

        Args:
            input_ids: prompts with their image slots.
            pixel_values: the views of all images, in the order of their slots.
            layouts: as in `arrange`.
            attention_mask: 0 on padding, which must be on the left; None: no padding.
            stop_ids: a row that has generated one of them repeats it; the loop ends when all rows have.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds = self.llm.embed(input_ids)
        if pixel_values is not None and len(pixel_values):
            visual = self.arrange(self.encode_images(pixel_values, tiles_of(layouts)), layouts)
            embeds = splice(embeds, input_ids, visual, image_token_id=self.image_token_id)
            if self.drops_tokens:
                embeds, mask = take_out(empty_slots(embeds, input_ids == self.image_token_id), embeds, mask)
        position_ids = self.positions(input_ids, (mask.cumsum(dim=1) - 1).clamp(min=0))
        cache, written = None, []
        stop = torch.tensor(list(stop_ids), device=input_ids.device, dtype=torch.long)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            hidden, cache = self.llm.decode(embeds, position_ids, mask, cache)
            token = self.llm.head(hidden[:, -1]).argmax(dim=-1)
            token = torch.where(ended, written[-1], token) if written else token
            written.append(token)
            ended |= torch.isin(token, stop)
            if ended.all():
                break
            embeds, position_ids = self.llm.embed(token[:, None]), position_ids[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return torch.stack(written, dim=1) if written else input_ids.new_zeros(len(input_ids), 0)

    def positions(self, input_ids: Int[Tensor, "B S"], position_ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L *axes"]:
        """Turn positions counted token by token into the language model's position ids (three axes in Qwen2-VL)."""
        return position_ids

    def forward(self, batch: Batch) -> Float[Tensor, "B S V"]:
        return self.llm.head(self.hidden(batch))

    def save_pretrained(self, folder: str | Path, *, image_size: int, image: dict | None = None) -> None:
        """Write configuration and weights in the format of `transformers`.

        `fastvlm.deployment.hub` adds the tokenizer and the processor.

        Args:
            image_size: side of a view in pixels.
            image: arguments of `ImageTransform`, which turns a file into views.

        Raises:
            ValueError: the model was built by hand and has no `recipe`.
        """
        from fastvlm.models.saved import describe, write_folder

        write_folder(self, describe(self, image_size=image_size, image=image), Path(folder))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> VLM:
        """Load a model from a folder that `save_pretrained` wrote, or from a hub id, in eval mode.

        Raises:
            ValueError: there is no model, it is of another type, or its weights do not fit (lists the tensors).
        """
        from fastvlm.models.saved import load_vlm

        return load_vlm(str(path))[0]

    def _must_touch_vision(self) -> bool:
        """Whether another rank may be waiting for this rank's vision gradients or weight shards."""
        path = [p for part in (self.encoder, self.resampler, self.projector) for p in part.parameters()]
        learns = self.training and torch.is_grad_enabled() and any(p.requires_grad for p in path)
        return learns or any(is_shard(p) for p in path)

    def _zero_from_blank_image(self, batch: Batch) -> Float[Tensor, ""]:
        """Return 0 with every trainable vision parameter in its graph; norm statistics do not change."""
        with frozen_statistics(self):
            return self.arrange(self.project(self.patches(batch.with_blank_image()))).sum() * 0.0


def run(part: nn.Module, x: Tensor, *more: Tensor | None) -> Tensor:
    """Return `part(x, *more)`, without building an autograd graph if neither `x` nor the part needs gradients."""
    learns = x.requires_grad or any(p.requires_grad for p in part.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        return part(x, *more)


def tiles_of(layouts: Layouts) -> Bool[Tensor, "I"] | None:
    """Return which views are tiles (all but the first of each image), or None if every view is an image."""
    if layouts is None:
        return None
    tiles = layouts[:, 0] * layouts[:, 1]
    views = torch.where(tiles == 1, 1, 1 + tiles)
    first = torch.zeros(int(views.sum()), dtype=torch.bool, device=layouts.device)
    first[views.cumsum(0) - views] = True
    return ~first
