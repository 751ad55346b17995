"""Weights of our encoders under the names that `transformers` uses."""

from __future__ import annotations

from torch import Tensor, nn


def split_qkv(fused: Tensor, name: str, kind: str) -> dict[str, Tensor]:
    return {f"{name}.{part}_proj.{kind}": piece for part, piece in zip("qkv", fused.chunk(3))}


def clip_weights(visual: nn.Module) -> dict[str, Tensor]:
    """Return an open_clip vision transformer's weights under the names of `CLIPVisionModel`."""
    state, out = visual.state_dict(), {}
    plain = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for name, value in state.items():
        if name in plain:
            out[plain[name]] = value
            continue
        _, _, layer, rest = name.split(".", 3)
        to = f"encoder.layers.{layer}"
        if rest.startswith("attn.in_proj_"):
            out |= split_qkv(value, f"{to}.self_attn", rest.removeprefix("attn.in_proj_"))
        else:
            module, _, kind = rest.rpartition(".")
            out[f"{to}.{inner[module]}.{kind}"] = value
    return out


def siglip_weights(vit: nn.Module) -> dict[str, Tensor]:
    """Return a timm SigLIP's weights under the names of Idefics3's vision model."""
    out = {}
    inner = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for name, value in vit.state_dict().items():
        if name == "pos_embed":
            out["embeddings.position_embedding.weight"] = value[0]
        elif name.startswith("patch_embed.proj."):
            out["embeddings.patch_embedding." + name.removeprefix("patch_embed.proj.")] = value
        elif name.startswith("norm."):
            out["post_layernorm." + name.removeprefix("norm.")] = value
        elif name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            to, (module, _, kind) = f"encoder.layers.{layer}", rest.rpartition(".")
            if module == "attn.qkv":
                out |= split_qkv(value, f"{to}.self_attn", kind)
            else:
                out[f"{to}.{'self_attn.out_proj' if module == 'attn.proj' else inner[module]}.{kind}"] = value
        # The rest is the classifier's attention pooling, which is not used.
    return out
