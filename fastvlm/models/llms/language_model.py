"""A causal language model of `transformers`, split into embedding, decoder and head, with packing and a KV cache."""

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
# Up to this many positions plain matrix products are faster than the fused kernel on a CPU, whose backward took 36 % of
# a step.
EAGER_UP_TO = 512


class LanguageModel(nn.Module):
    """Wrapper of any decoder-only model of `transformers`.

    Args:
        hf: the model with its head, e.g. `LlamaForCausalLM`.
        attention: `eager`, `sdpa`, `flex_attention`, `flash_attention_2` (needs the package flash-attn, a GPU and
            16-bit precision), or `auto`: eager for short rows on a CPU, sdpa otherwise. Cached decoding uses sdpa where
            flex or flash is chosen.
        gradient_checkpointing: recompute the layers in the backward pass instead of keeping their activations.
        compile: `torch.compile` each decoder layer with dynamic lengths: True, or one of torch's modes.

    Raises:
        ValueError: `attention` or `compile` is unknown, flash-attn is not installed, or the model changes logits after
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
            raise ValueError(f"llm.compile={compile} is not one of true, false, {', '.join(COMPILE)}")
        # The loss calls `head` on gathered positions, so nothing may follow it.
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
        """Width of the embeddings, which may differ from that of the layers (OPT-350m)."""
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
        """Return the last hidden states. A position attends only to itself and earlier positions of its segment.

        Padding (segment 0) attends to earlier padding, so that no row of the mask is empty, which would give NaN.
        """
        if self._implementation(inputs_embeds, cached=False) == "flash_attention_2":
            return self._hidden_by_sequence(inputs_embeds, position_ids, segment_ids)
        mask = self._mask(segment_ids, inputs_embeds)
        # With a cache, even an empty one, transformers would ignore the segments.
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
        """Append S positions to the cache; return their last hidden states and the cache.

        Args:
            attention_mask: over all K = cached + S positions, in cache order; 0 hides a position. Rows may be padded on
                either side, and differently in every call.
            cache: the cache of an earlier call (extended in place); None starts a new one.

        Raises:
            ValueError: K is not cached + S, or a row is longer than a sliding window, which the mask does not apply.
        """
        cache = self.new_cache() if cache is None else cache
        cached, new = cache.get_seq_length(), inputs_embeds.shape[1]
        if attention_mask.shape[1] != cached + new:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} positions, the cache {cached} + {new}")
        if self.window is not None and (longest := int(attention_mask.long().sum(dim=1).max())) > self.window:
            raise ValueError(
                f"llm: {longest} positions exceed the sliding window of {self.window}; shorten prompt or answer"
            )
        keys = torch.arange(cached + new, device=inputs_embeds.device)
        queries = keys[cached:, None]
        # A hidden position still attends to itself: an empty row of the mask would give NaN.
        allowed = ((keys <= queries) & attention_mask.bool()[:, None]) | (keys == queries)
        return self._decode(inputs_embeds, position_ids, self._dense(allowed[:, None], inputs_embeds), cache), cache

    def prefill(
        self,
        inputs_embeds: Float[Tensor, "B S D"],
        attention_mask: Int[Tensor, "B K"] | Bool[Tensor, "B K"],
        position_ids: Int[Tensor, "B S"] | None = None,
        cache: DynamicCache | None = None,
    ) -> tuple[Float[Tensor, "B V"], DynamicCache]:
        """Return the logits at each row's last visible position, and the cache.

        `position_ids` None counts visible tokens.
        """
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
        """Return the last hidden states by FlashAttention, which takes sequence lengths instead of a mask.

        Every segment of every row becomes one sequence of a single long row.
        """
        self._check_window(segment_ids)
        rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
        name = (rows * (segment_ids.max() + 1) + segment_ids).flatten()
        # A segment need not be contiguous: empty slots inside it are padding.
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
            chosen = "sdpa"  # flex would compile for every length of the cache; flash takes no mask
        self.hf.config._attn_implementation = chosen  # every layer reads it on each call
        return chosen

    def _mask(self, segment_ids: Tensor, inputs_embeds: Tensor) -> Any:
        """Return the block-diagonal causal mask in the format of the attention implementation."""
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
    """Build a language model with random weights.

    Args:
        model_type: a name `transformers.AutoConfig` knows: llama, qwen2, qwen3, ...
        vocab_size: rows of the embedding, the tokenizer's length.
        attention, gradient_checkpointing, compile: as in `LanguageModel`.
        config: arguments of its configuration, e.g. hidden_size, num_hidden_layers.

    Raises:
        ValueError: the type or an argument is unknown (transformers would silently ignore a misspelt one).
    """
    # Override the library's default ids: the tokenizer defines the special tokens.
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
    """Load a language model with pretrained weights, and enlarge its embedding if the tokenizer is larger.

    Args:
        path: a folder that `save_pretrained` wrote, or a hub id.
        vocab_size: the tokenizer's length. A larger embedding (padded vocabularies) is kept.
        dtype: dtype of the weights in memory; with float32, mixed precision trains float32 master weights.

    Raises:
        ValueError: the model is found neither locally nor on the hub, or its weights are incomplete; an unknown dtype.
    """
    if not isinstance(kind := getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"llm.dtype={dtype} is not a dtype of torch; take float32, bfloat16 or float16")
    more = {"dtype": kind, "ignore_mismatched_sizes": True, "output_loading_info": True}
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
