"""A causal language model of `transformers` as embeddings -> hidden states -> logits, with packing and a cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from fastvlm.models.hub import fetch, known_config, refuse_incomplete

ATTENTION = ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2")
COMPILE = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Below this many positions plain matrix products beat the fused kernel on a CPU: its backward was 36 % of a step.
EAGER_UP_TO = 512


class LanguageModel(nn.Module):
    """Wraps any decoder-only model of `transformers`.

    Args:
        hf: the model with its head, e.g. `LlamaForCausalLM`.
        attention: `eager`, `sdpa`, `flex_attention`, `flash_attention_2` (the package flash-attn, a GPU and 16-bit
            precision), or `auto`: eager for short rows on a CPU, sdpa otherwise. Cached decoding is sdpa's where
            flex or flash is chosen.
        gradient_checkpointing: recompute the layers in the backward pass instead of keeping their activations.
        compile: `torch.compile` each decoder layer, for lengths of any number: True, or one of torch's modes.

    Raises:
        ValueError: `attention` or `compile` is not known, flash-attn is not there, or the model changes logits after
            its head.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        *,
        attention: str = "auto",
        gradient_checkpointing: bool = False,
        compile: bool | str = False,
    ):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"llm.attention={attention} is not one of {', '.join(ATTENTION)}")
        if attention == "flash_attention_2" and not is_flash_attn_2_available():
            raise ValueError(
                "llm.attention=flash_attention_2 needs the package flash-attn and a CUDA device, and one is missing: "
                "pip install flash-attn, or choose llm.attention=sdpa or flex_attention"
            )
        if not isinstance(compile, bool) and compile not in COMPILE:
            raise ValueError(f"llm.compile={compile} is none of true, false, {', '.join(COMPILE)}")
        # `head` must be the whole way from hidden states to logits, because the loss calls it on gathered positions.
        for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(hf.config, key, None) not in (None, 1, 1.0):
                raise ValueError(f"llm: {hf.config.model_type} sets {key} after its head, which is not supported")
        self.hf, self.attention = hf, attention
        windows = "sliding_attention" in (getattr(hf.config, "layer_types", None) or ())
        windows |= hf.config.model_type == "mistral"
        self.window: int | None = getattr(hf.config, "sliding_window", None) if windows else None
        if gradient_checkpointing:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if compile:
            for layer in hf.get_decoder().layers:
                layer.compile(dynamic=True, mode="default" if compile is True else compile)

    @property
    def dim(self) -> int:
        """Width of the embeddings; of OPT-350m that is not the layers'."""
        return self.hf.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.hf.get_input_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int:
        return self.hf.config.max_position_embeddings

    def embed(self, input_ids: Int[Tensor, "*B S"]) -> Float[Tensor, "*B S D"]:
        return self.hf.get_input_embeddings()(input_ids)

    def head(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        return self.hf.get_output_embeddings()(hidden)

    def hidden(
        self,
        inputs_embeds: Float[Tensor, "B S D"],
        position_ids: Int[Tensor, "B S *axes"],
        segment_ids: Int[Tensor, "B S"],
    ) -> Float[Tensor, "B S D"]:
        """Last hidden states. A position sees itself and what stands before it in its own segment, nothing else.

        Padding (segment 0) sees earlier padding, so that no row of the mask is empty and nothing becomes NaN.
        """
        if self._implementation(inputs_embeds, cached=False) == "flash_attention_2":
            return self._hidden_by_sequence(inputs_embeds, position_ids, segment_ids)
        mask = self._mask(segment_ids, inputs_embeds)
        # A cache, even an empty one, would make transformers ignore the segments (findings.md, packed sequences).
        return self._decode(inputs_embeds, position_ids, mask, cache=None)

    # ------------------------------------------------------------------------------------------------ cached decoding

    def new_cache(self) -> DynamicCache:
        return DynamicCache()

    def decode(
        self,
        inputs_embeds: Float[Tensor, "B S D"],
        position_ids: Int[Tensor, "B S *axes"],
        attention_mask: Int[Tensor, "B K"] | Bool[Tensor, "B K"],
        cache: DynamicCache | None = None,
    ) -> tuple[Float[Tensor, "B S D"], DynamicCache]:
        """Appends S positions to the cache; returns their last hidden states and the grown cache.

        Args:
            attention_mask: over all K = cached + S positions, in order of the cache; 0 hides a position. Rows may be
                padded on the left or on the right, and differently each time.
            cache: what an earlier call returned (it grows in place), or None to begin.

        Raises:
            ValueError: K is not cached + S.
        """
        cache = self.new_cache() if cache is None else cache
        cached, new = cache.get_seq_length(), inputs_embeds.shape[1]
        if attention_mask.shape[1] != cached + new:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} positions, the cache {cached} + {new}")
        keys = torch.arange(cached + new, device=inputs_embeds.device)
        queries = keys[cached:, None]
        # A hidden position still sees itself: an empty row of the mask would be NaN.
        allowed = ((keys <= queries) & attention_mask.bool()[:, None]) | (keys == queries)
        return self._decode(inputs_embeds, position_ids, self._dense(allowed[:, None], inputs_embeds), cache), cache

    def prefill(
        self,
        inputs_embeds: Float[Tensor, "B S D"],
        attention_mask: Int[Tensor, "B K"] | Bool[Tensor, "B K"],
        position_ids: Int[Tensor, "B S"] | None = None,
        cache: DynamicCache | None = None,
    ) -> tuple[Float[Tensor, "B V"], DynamicCache]:
        """Logits after each row's last visible position, and the cache. Positions count visible tokens by default."""
        new = inputs_embeds.shape[1]
        visible = attention_mask.long()
        if position_ids is None:
            position_ids = (visible.cumsum(1) - 1).clamp(min=0)[:, -new:]
        hidden, cache = self.decode(inputs_embeds, position_ids, attention_mask, cache)
        order = torch.arange(1, new + 1, device=hidden.device)
        last = (visible[:, -new:] * order).argmax(1)
        return self.head(hidden[torch.arange(hidden.shape[0], device=hidden.device), last]), cache

    # -------------------------------------------------------------------------------------------------------- inside

    def _hidden_by_sequence(self, inputs_embeds: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """FlashAttention knows no mask: every segment of every row becomes a sequence of one long row."""
        self._check_window(segment_ids)
        rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
        name = (rows * (segment_ids.max() + 1) + segment_ids).flatten()
        # A segment need not stand together: slots left empty inside it are padding.
        order = name.argsort(stable=True)
        lengths = name[order].unique_consecutive(return_counts=True)[1]
        ends, longest = F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())
        hidden = self.hf.get_decoder()(
            inputs_embeds=inputs_embeds.flatten(0, 1)[order][None],
            position_ids=position_ids.flatten()[order][None],
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state[0]
        return hidden[order.argsort()].view(*segment_ids.shape, -1)

    def _check_window(self, segment_ids: Tensor) -> None:
        length = segment_ids.shape[1]
        if self.window is not None and length > self.window:
            raise ValueError(
                f"llm: rows of {length} positions exceed the sliding window of {self.window}; shorten max_tokens"
            )

    def _decode(self, inputs_embeds: Tensor, position_ids: Tensor, mask: Any, cache: DynamicCache | None) -> Tensor:
        return self.hf.get_decoder()(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _implementation(self, inputs_embeds: Tensor, *, cached: bool) -> str:
        chosen = self.attention
        if chosen == "auto":
            eager = inputs_embeds.device.type == "cpu" and inputs_embeds.shape[1] <= EAGER_UP_TO
            chosen = "eager" if eager else "sdpa"
        elif chosen in ("flex_attention", "flash_attention_2") and cached:
            chosen = "sdpa"  # flex compiles per length, a cache grows by one; flash takes no mask of several rows
        self.hf.config._attn_implementation = chosen  # every layer reads it on each call
        return chosen

    def _mask(self, segment_ids: Tensor, inputs_embeds: Tensor) -> Any:
        """Block-diagonal causal mask in the form the implementation wants."""
        rows, length = segment_ids.shape
        self._check_window(segment_ids)
        if self._implementation(inputs_embeds, cached=False) == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            # A lambda, because flex_attention counts the arguments of the bare function.
            visible = lambda b, h, q, k: (q >= k) & (segment_ids[b, q] == segment_ids[b, k])
            return create_block_mask(visible, rows, None, length, length, device=segment_ids.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
        same = segment_ids[:, :, None] == segment_ids[:, None, :]  # (B, S, S)
        return self._dense((same & causal)[:, None], inputs_embeds, cached=False)

    def _dense(self, allowed: Bool[Tensor, "B 1 S K"], inputs_embeds: Tensor, cached: bool = True) -> Tensor:
        if self._implementation(inputs_embeds, cached=cached) == "sdpa":
            return allowed
        lowest = torch.finfo(inputs_embeds.dtype).min
        return torch.zeros_like(allowed, dtype=inputs_embeds.dtype).masked_fill_(~allowed, lowest)


def from_config(
    model_type: str,
    *,
    vocab_size: int,
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    compile: bool | str = False,
    **config: Any,
) -> LanguageModel:
    """A language model with random weights.

    Args:
        model_type: a name `transformers.AutoConfig` knows: llama, qwen2, qwen3, ...
        vocab_size: rows of the embedding, the tokenizer's length.
        config: that configuration's own arguments, e.g. hidden_size, num_hidden_layers.

    Raises:
        ValueError: the type or an argument is not known (transformers alone would keep a misspelt one and ignore it).
    """
    # No token is special by the library's default ids: the tokenizer says which are.
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config}
    hf = AutoModelForCausalLM.from_config(known_config(model_type, config, key="llm", vocab_size=vocab_size))
    return LanguageModel(hf, attention=attention, gradient_checkpointing=gradient_checkpointing, compile=compile)


def from_pretrained(
    path: str,
    *,
    vocab_size: int,
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    compile: bool | str = False,
    dtype: str = "float32",
) -> LanguageModel:
    """A language model with pretrained weights; its embedding grows if the tokenizer is larger.

    Args:
        path: a folder `save_pretrained` wrote, or a hub id.
        vocab_size: the tokenizer's length. A larger embedding (padded vocabularies) stays as it is.
        dtype: of the weights in memory; float32 lets mixed precision keep exact ones.

    Raises:
        ValueError: no such model here and none to be had from the hub, or its weights are not whole.
    """
    more = {"dtype": getattr(torch, dtype), "ignore_mismatched_sizes": True, "output_loading_info": True}
    hf, info = fetch(
        lambda: AutoModelForCausalLM.from_pretrained(path, **more),
        what=f"llm.path={path}",
        mend="name a folder with config.json and model.safetensors, a hub id while online, or take a small model with "
        "random weights, such as llm=qwen2_micro",
    )
    refuse_incomplete(info, hf.state_dict().keys(), what=f"llm.path={path}")
    if vocab_size > hf.get_input_embeddings().weight.shape[0]:
        hf.resize_token_embeddings(vocab_size)
    return LanguageModel(hf, attention=attention, gradient_checkpointing=gradient_checkpointing, compile=compile)
