"""A fast inference-only decoder for Llama-like models.

With small models on a CPU, `transformers` spends more time around the matrix products of a token than in them: it
rebuilds masks and rotary tables, repeats keys for every query head and passes through a dozen wrappers per layer. This
decoder does little besides the products, and in the last layer computes only the last position of a prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from fastvlm.inference import products
from fastvlm.inference.kv_cache import KVCache
from fastvlm.models.llms.language_model import LanguageModel

LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
SILU = (nn.SiLU, type(ACT2FN["silu"]))
FIXED_ROTATIONS = ("default", "linear", "llama3")  # other types depend on the sequence length


def fits(llm: nn.Module) -> bool:
    """Return whether `FastDecoder` reproduces this model: a known architecture, unmodified layers, no hooks."""
    if type(llm) is not LanguageModel or llm.window is not None:
        return False
    decoder = llm.hf.get_decoder()
    layers = getattr(decoder, "layers", ())
    kind = type(layers[0]) if len(layers) else None
    rotation = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in llm.hf.modules())
    # LoRA and quantisation replace linear layers, which are called as they are; other modifications are not supported.
    plain = all(type(layer) is kind and type(layer.self_attn).__module__ == kind.__module__ for layer in layers)
    return kind in LAYERS and plain and rotation in FIXED_ROTATIONS and not hooked


class FastDecoder:
    """A faster `LanguageModel.decode` for models accepted by `fits`.

    Args:
        llm: its modules are called directly, so its weights may change later.

    Raises:
        ValueError: the model is not supported.
    """

    def __init__(self, llm: LanguageModel):
        if not fits(llm):
            raise ValueError(f"{type(llm.hf).__name__} is not a supported decoder; use LanguageModel.decode")
        self.llm, self.decoder, config = llm, llm.hf.get_decoder(), llm.hf.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = self.decoder.layers[0].self_attn.head_dim
        self.scale = self.decoder.layers[0].self_attn.scaling
        self.attention_dtype: torch.dtype | None = getattr(llm, "attention_dtype", None)  # None: that of the input
        self._rotations: tuple[Tensor, Tensor] | None = None

    def decode(
        self,
        inputs_embeds: Float[Tensor, "B S D"],
        position_ids: Int[Tensor, "B S"],
        attention_mask: Int[Tensor, "B K"] | None,
        cache: KVCache,
    ) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """Append S positions to the cache and return the final hidden state of the last one, and the cache.

        Args:
            attention_mask: over all K = cached + S columns, 0 hides a column; None shows all.
        """
        cached, length = cache.get_seq_length(), inputs_embeds.shape[1]
        cos, sin = (table[position_ids][:, None] for table in self.rotation_tables(cached + length, inputs_embeds))
        mask = None
        if attention_mask is not None or (length > 1 and cached):
            mask = self._mask(attention_mask, cached, inputs_embeds)
        bias = self._bias(mask, cached, inputs_embeds) if length > 1 else None
        x, layers = inputs_embeds, self.decoder.layers
        for i, layer in enumerate(layers):
            x = self.layer(layer, x, cos, sin, mask, bias, cache, i, last=i == len(layers) - 1)
        return norm(self.decoder.norm, x), cache

    def layer(self, layer, x, cos, sin, mask, bias, cache, i, *, last: bool):
        attention, rows, length = layer.self_attn, x.shape[0], x.shape[1]
        h = norm(layer.input_layernorm, x)
        k = attention.k_proj(h).view(rows, length, self.kv_heads, self.dim)
        v = attention.v_proj(h).view(rows, length, self.kv_heads, self.dim).transpose(1, 2)
        if last and length > 1:
            x, h, length = x[:, -1:], h[:, -1:], 1
            mask = None if mask is None else mask[:, :, -1:]
        q = attention.q_proj(h).view(rows, length, self.heads, self.dim)
        if hasattr(attention, "q_norm"):
            q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
        q = rotate(q.transpose(1, 2), cos[:, :, -length:], sin[:, :, -length:])
        keys, values = cache.update(rotate(k.transpose(1, 2), cos, sin), v, i)
        out = self._attend(q, keys, values, mask, bias)
        x = x + attention.o_proj(out)
        return x + feed_forward(layer.mlp, norm(layer.post_attention_layernorm, x))

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Float[Tensor, "B S E"]:
        rows, _, length, _ = q.shape
        if length == 1:
            # Query heads that share keys become rows of one product, so keys are not repeated.
            grouped = q.view(rows, self.kv_heads, -1, self.dim)
            weights = grouped @ keys.transpose(-2, -1) * self.scale
            if mask is not None:
                weights = weights.masked_fill(~mask, -torch.inf)
            return (weights.softmax(-1, dtype=torch.float32).to(q.dtype) @ values).reshape(rows, 1, -1)
        if bias is not None:
            rounded = (t.to(bias.dtype) for t in (q, keys, values))
            out = products.attend(*rounded, scale=self.scale, bias=bias).to(q.dtype)
        else:
            out = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
        return out.transpose(1, 2).reshape(rows, length, -1)

    def _bias(self, mask: Tensor | None, cached: int, x: Tensor) -> Tensor | None:
        """Additive mask (B or 1, 1, S, K), -inf where masked; None if the fused kernel is used instead."""
        (rows, length, _), dtype = x.shape, self.attention_dtype or x.dtype
        if not products.pays(rows, self.heads, length, cached + length, dtype=dtype, device=x.device):
            return None
        allowed = self._mask(None, cached, x) if mask is None else mask
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)

    def _mask(self, attention_mask: Tensor | None, cached: int, x: Tensor) -> Tensor:
        """Mask (B or 1, 1, S, K), True where visible. Padding attends to itself: a fully masked row would give NaN."""
        columns = torch.arange(cached + x.shape[1], device=x.device)
        queries = columns[cached:, None]
        allowed = columns <= queries
        if attention_mask is None:
            return allowed[None, None]
        return ((allowed & attention_mask.bool()[:, None]) | (columns == queries))[:, None]

    def rotation_tables(self, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for positions 0 to at least `length` - 1, cached."""
        held = self._rotations
        if held is None or len(held[0]) < length or held[0].dtype != x.dtype or held[0].device != x.device:
            positions = torch.arange(max(256, 2 * length), device=x.device)
            cos, sin = self.decoder.rotary_emb(x, positions[None])
            self._rotations = held = (cos[0], sin[0])
        return held


def feed_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """Apply the gated MLP, in place on its widest tensors: allocating new ones costs as much as the arithmetic."""
    if not isinstance(mlp.act_fn, SILU):
        return mlp(x)
    return mlp.down_proj(F.silu(mlp.gate_proj(x), inplace=True).mul_(mlp.up_proj(x)))


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Apply RMSNorm as one fused call."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def rotate(x: Float[Tensor, "B H S d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B H S d"]:
    """Apply rotary position embeddings (RoFormer, arXiv 2104.09864), pairing halves as `transformers` does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
