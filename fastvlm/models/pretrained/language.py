"""Language models of pretrained vision-language models, with their special attention masks and positions."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastvlm.models.llms.language_model import LanguageModel

NO_FLASH = "vlm.attention=flash_attention_2 knows neither PaliGemma's mask nor Qwen2-VL's positions; set sdpa or auto"


def with_head(decoder: PreTrainedModel, head: nn.Module) -> PreTrainedModel:
    """Combine an existing decoder and head into the causal language model class of that decoder.

    Raises:
        ValueError: `transformers` has no causal language model class for this decoder.
    """
    with torch.device("meta"):
        try:
            hf = AutoModelForCausalLM.from_config(decoder.config)
        except ValueError:
            raise ValueError(f"vlm: {decoder.config.model_type} has no causal language model in transformers") from None
    setattr(hf, hf.base_model_prefix, decoder)
    hf.set_output_embeddings(head)
    hf.config = decoder.config  # the layers read the attention implementation from this very object
    return hf


class DecoderWithHead(PreTrainedModel):
    """Causal language model from a decoder without a causal class in `transformers` (Qwen2-VL) and a head."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, decoder: PreTrainedModel, head: nn.Module):
        super().__init__(decoder.config)
        self.model, self.lm_head = decoder, head
        self.config = decoder.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self.model


class MRoPELanguageModel(LanguageModel):
    """Language model with positions (B, S, 3) for time, height and width, equal on text (arXiv 2409.12191)."""

    def _hidden_by_sequence(self, *args) -> Tensor:
        raise ValueError(NO_FLASH)

    def _decode(self, inputs_embeds: Tensor, position_ids: Tensor, mask, cache) -> Tensor:
        if position_ids.ndim == 2:
            position_ids = position_ids[..., None].expand(-1, -1, 3)
        return super()._decode(inputs_embeds, position_ids.permute(2, 0, 1), mask, cache)


def image_positions(
    counted: Int[Tensor, "B S"], is_slot: Bool[Tensor, "B S"], starts: Bool[Tensor, "B S"], *, side: int
) -> Int[Tensor, "B S 3"]:
    """Compute M-RoPE positions: an image of side x side tokens spans `side` positions in height and in width.

    Args:
        counted: positions counted token by token, restarting with every sample.
        is_slot: True on visual tokens; every image has side^2 consecutive slots.
        starts: True on the first position of every sample.
        side: side of the grid of visual tokens.
    """
    slots = is_slot.long().cumsum(dim=1)
    # Slots before each position within its sample: all slots before it minus those before the sample's start.
    before = slots - is_slot.long()
    at_start = torch.where(starts, before, torch.zeros_like(before)).cummax(dim=1).values
    before = before - at_start
    images, inside = before // side**2, before % side**2
    saved = (side**2 - side) * images  # positions that earlier complete images do not use
    plain = (counted - saved)[..., None].expand(-1, -1, 3)
    corner = counted - saved - inside
    spread = torch.stack([corner, corner + inside // side, corner + inside % side], dim=-1)
    return torch.where(is_slot[..., None], spread, plain)


class PrefixLanguageModel(LanguageModel):
    """Prefix language model: bidirectional attention over the prompt, causal over the answer (arXiv 2407.07726).

    In decoding, what is read into an empty cache is the prompt, and what follows is the answer. In training,
    `hidden_with_prefix` is told which positions are the prompt.
    """

    prefix: Bool[Tensor, "B S"] | None = None
    whole_prompts = True  # cached keys of a prompt's beginning depend on its end, so prefixes cannot be reused

    def _hidden_by_sequence(self, *args) -> Tensor:
        raise ValueError(NO_FLASH)

    def _mask(self, segment_ids: Tensor, inputs_embeds: Tensor):
        if self.prefix is None:
            return super()._mask(segment_ids, inputs_embeds)
        length = segment_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
        same = segment_ids[:, :, None] == segment_ids[:, None, :]  # (B, S, S)
        both_ways = self.prefix[:, :, None] & self.prefix[:, None, :]
        return self._dense((same & (causal | both_ways))[:, None], inputs_embeds, cached=False)

    def hidden_with_prefix(
        self, inputs_embeds: Tensor, position_ids: Tensor, segment_ids: Tensor, prefix: Bool[Tensor, "B S"]
    ) -> Tensor:
        self.prefix = prefix
        try:
            return self.hidden(inputs_embeds, position_ids, segment_ids)
        finally:
            self.prefix = None

    def decode(self, inputs_embeds, position_ids, attention_mask, cache=None):
        cache = self.new_cache() if cache is None else cache
        if cache.get_seq_length():
            return super().decode(inputs_embeds, position_ids, attention_mask, cache)
        keys = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        allowed = attention_mask.bool()[:, None].expand(-1, len(keys), -1) | (keys == keys[:, None])
        return self._decode(inputs_embeds, position_ids, self._dense(allowed[:, None], inputs_embeds), cache), cache

    def _decode(self, inputs_embeds: Tensor, position_ids: Tensor, mask, cache) -> Tensor:
        return super()._decode(inputs_embeds, position_ids + 1, mask, cache)  # PaliGemma counts from 1


def prefix_of(labels: Int[Tensor, "B S"], segment_ids: Int[Tensor, "B S"], ignore: int) -> Bool[Tensor, "B S"]:
    """Mark positions before the first learned token of their sample; without learned tokens, the whole sample."""
    learned = labels != ignore
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    earlier = torch.ones(labels.shape[1], labels.shape[1], dtype=torch.bool, device=labels.device).tril()
    return ~(same & earlier & learned[:, None, :]).any(dim=2) & (segment_ids > 0)
