"""Sizes of published language models, from their config.json on the hub, so that planning needs no download."""

from __future__ import annotations

from typing import Any

TIED = {"tie_word_embeddings": True}


def sizes(
    model_type: str, vocabulary: int, positions: int, layers: tuple[int, int, int, int, int], **more: Any
) -> dict[str, Any]:
    """Return arguments of `from_config`; `layers` is width, depth, heads, key-value heads, feed-forward width."""
    dim, depth, heads, key_heads, hidden = layers
    inner = {"ffn_dim": hidden} if model_type == "opt" else {"intermediate_size": hidden}
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        **({} if model_type == "opt" else {"num_key_value_heads": key_heads}),
        **inner,
        **more,
    }


QWEN_1_5B = (1536, 28, 12, 2, 8960)
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": sizes("qwen2", 151936, 32768, (896, 24, 14, 2, 4864), **TIED),
    "Qwen/Qwen2.5-1.5B": sizes("qwen2", 151936, 131072, QWEN_1_5B, **TIED),
    "Qwen/Qwen2.5-1.5B-Instruct": sizes("qwen2", 151936, 32768, QWEN_1_5B, **TIED),
    "Qwen/Qwen2.5-7B-Instruct": sizes("qwen2", 152064, 32768, (3584, 28, 28, 4, 18944)),
    "Qwen/Qwen3-0.6B": sizes("qwen3", 151936, 40960, (1024, 28, 16, 8, 3072), head_dim=128, **TIED),
    "Qwen/Qwen3-1.7B": sizes("qwen3", 151936, 40960, (2048, 28, 16, 8, 6144), head_dim=128, **TIED),
    "meta-llama/Llama-3.2-1B-Instruct": sizes("llama", 128256, 131072, (2048, 16, 32, 8, 8192), **TIED),
    "lmsys/vicuna-7b-v1.5": sizes("llama", 32000, 4096, (4096, 32, 32, 32, 11008)),
    "HuggingFaceTB/SmolLM2-135M-Instruct": sizes("llama", 49152, 8192, (576, 30, 9, 3, 1536), **TIED),
    "HuggingFaceTB/SmolLM2-360M-Instruct": sizes("llama", 49152, 8192, (960, 32, 15, 5, 2560), **TIED),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": sizes("llama", 49152, 8192, (2048, 24, 32, 32, 8192), **TIED),
    "facebook/opt-125m": sizes("opt", 50272, 2048, (768, 12, 12, 12, 3072), word_embed_proj_dim=768),
    "facebook/opt-1.3b": sizes("opt", 50272, 2048, (2048, 24, 32, 32, 8192), word_embed_proj_dim=2048),
}
