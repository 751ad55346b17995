"""The vision-language model: encoder -> resampler -> projector -> splice -> language model."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastvlm.batch import Batch
from fastvlm.models.fit import check_fit
from fastvlm.models.llms.language_model import LanguageModel
from fastvlm.models.norms import frozen_statistics
from fastvlm.models.slots import empty_slots, hide
from fastvlm.models.splice import splice


class VLM(nn.Module):
    """
    pixel_values (I, 3, H, W) -> encoder -> patches (I, N, D_v; or cached) -> resampler -> visual tokens (I, M, D_v)
        -> projector -> (I, M, D_t) -> splice at every image slot of input_ids (B, S) -> llm -> logits (B, S, V)

    Args:
        encoder: normalised images -> patches; knows its `out_dim`, `mean`, `std`, `num_patches(image_size)`.
        resampler: patches -> visual tokens; knows `num_tokens_out(num_patches)`. With `drops_tokens` an image may have
            fewer, the slots before them zero.
        projector: visual tokens to the width of the language model.
        llm: embeds ids, turns embeddings into hidden states and those into logits.
        image_token_id: the id that marks an image slot, `Tokenizer.image_id`.
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
        # 255 because pixels arrive as bytes: a quarter of float32's way over the bus.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (encoder.mean, encoder.std))
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in ("encoder", "resampler", "projector", "llm")}

    @property
    def drops_tokens(self) -> bool:
        return any(getattr(part, "drops_tokens", False) for part in (self.encoder, self.resampler))

    def num_visual_tokens(self, image_size: int) -> int:
        return self.resampler.num_tokens_out(self.encoder.num_patches(image_size))

    def normalise(self, pixel_values: UInt8[Tensor, "I 3 H W"]) -> Float[Tensor, "I 3 H W"]:
        return ((pixel_values - self.pixel_mean) / self.pixel_std).to(next(self.projector.parameters()).dtype)

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
        """The encoder's output for a batch's images: computed, or as it was cached."""
        if batch.features is None:
            return self.encode_patches(batch.pixel_values, batch.is_tile)
        return batch.features.to(next(self.projector.parameters()).dtype)

    def project(self, patches: Float[Tensor, "I N D_v"]) -> Float[Tensor, "I M D_t"]:
        """Visual tokens; of a resampler that drops some, their slots are exactly zero."""
        tokens = run(self.resampler, patches)
        visual = run(self.projector, tokens)
        return visual * (tokens != 0).any(dim=-1, keepdim=True) if self.drops_tokens else visual

    def embed(self, batch: Batch) -> Float[Tensor, "B S D"]:
        """What the language model reads: text embeddings with the images' visual tokens in their slots."""
        text = self.llm.embed(batch.input_ids)
        if batch.num_images:
            visual = self.project(self.patches(batch))
        else:
            visual = text.new_zeros(0, 1, text.shape[-1])
            if self._must_touch_vision():
                text = text + self._zero_from_blank_image(batch)
        return splice(text, batch.input_ids, visual, image_token_id=self.image_token_id)

    def hidden(self, batch: Batch) -> Float[Tensor, "B S D"]:
        """Last hidden states; samples packed in one row do not see each other."""
        embeds, position_ids, segment_ids = self.embed(batch), batch.position_ids, batch.segment_ids
        if self.drops_tokens:
            empty = empty_slots(embeds, batch.input_ids == self.image_token_id)
            position_ids, segment_ids = hide(empty, position_ids, segment_ids)
        return self.llm.hidden(embeds, position_ids, segment_ids)

    def forward(self, batch: Batch) -> Float[Tensor, "B S V"]:
        return self.llm.head(self.hidden(batch))

    def _must_touch_vision(self) -> bool:
        """Whether another rank may be waiting for this one's vision gradients, or for its shard of the weights."""
        path = [p for part in (self.encoder, self.resampler, self.projector) for p in part.parameters()]
        learns = self.training and torch.is_grad_enabled() and any(p.requires_grad for p in path)
        return learns or any(isinstance(p, DTensor) for p in path)

    def _zero_from_blank_image(self, batch: Batch) -> Float[Tensor, ""]:
        """0, with every trainable vision parameter in its graph. Norm statistics do not see the blank image."""
        blank = lambda images: images.new_zeros(1, *images.shape[1:])  # even no images have a size
        features = None if batch.features is None else blank(batch.features)
        with frozen_statistics(self):
            patches = self.patches(
                replace(batch, pixel_values=blank(batch.pixel_values), features=features, is_tile=None)
            )
            return self.project(patches).sum() * 0.0


def run(part: nn.Module, x: Tensor, *more: Tensor | None) -> Tensor:
    """`part(x, *more)`. Frozen parts at the start of the path cost no graph; the first trainable one begins it."""
    learns = x.requires_grad or any(p.requires_grad for p in part.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        return part(x, *more)
