"""Vision towers of our encoders in the form of `transformers`: sizes for its configurations, weights by its names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fastvlm.deployment.weights import clip_weights, siglip_weights
from fastvlm.models.encoders.open_clip_encoder import OpenClipEncoder
from fastvlm.models.encoders.timm_encoder import TimmEncoder
from fastvlm.models.encoders.transformers_encoder import TransformersEncoder

POSITIONS = "embeddings.position_embedding.weight"


class NoStockClass(ValueError):
    """The parts equal no class of `transformers`; the message says which part differs and what would fit."""


class Tower(NamedTuple):
    """Arguments of CLIP's and SigLIP's configurations, and the weights of their vision models."""

    sizes: dict[str, object]
    weights: dict[str, Tensor]


def is_clip(encoder: nn.Module) -> bool:
    """Return whether it is CLIP's vision transformer as in LLaVA: patches only, without the final norm."""
    if isinstance(encoder, OpenClipEncoder):
        return not (encoder.norm or encoder.class_token)
    return of_transformers(encoder, "clip_vision_model", norm=False)


def is_siglip(encoder: nn.Module, *, norm: bool) -> bool:
    """Return whether it is SigLIP's vision transformer, with its final norm or (`norm=False`) without."""
    if isinstance(encoder, TransformersEncoder):
        return of_transformers(encoder, "siglip_vision_model", norm=norm)
    vit = getattr(encoder, "model", None)
    return (
        norm
        and isinstance(encoder, TimmEncoder)
        and all(hasattr(vit, name) for name in ("patch_embed", "pos_embed", "blocks", "norm"))
        and encoder.num_prefix == 0
        and isinstance(vit.norm_pre, nn.Identity)
        and isinstance(vit.norm, nn.LayerNorm)
        and vit.pos_embed is not None
    )


def of_transformers(encoder: nn.Module, kind: str, *, norm: bool) -> bool:
    if not isinstance(encoder, TransformersEncoder) or encoder.name != kind or encoder.class_token:
        return False
    return norm != isinstance(encoder.norm, nn.Identity)


def clip_tower(encoder: OpenClipEncoder | TransformersEncoder, image_size: int) -> Tower:
    """Return a CLIP encoder's tower with the encoder's position embeddings for this size, interpolated or not."""
    if isinstance(encoder, TransformersEncoder):
        return transformers_tower(encoder, image_size)
    visual = encoder.visual
    blocks, side = visual.transformer.resblocks, image_size // encoder.stride
    sizes = dict(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=image_size,
        patch_size=encoder.stride,
        hidden_act=activation(blocks[0].mlp.gelu),
        layer_norm_eps=blocks[0].ln_1.eps,
    )
    return Tower(sizes, clip_weights(visual) | {POSITIONS: encoder._positions([side, side])[0]})


def siglip_tower(encoder: TimmEncoder | TransformersEncoder, image_size: int) -> Tower:
    if isinstance(encoder, TransformersEncoder):
        return transformers_tower(encoder, image_size)
    vit = encoder.model
    block = vit.blocks[0]
    sizes = dict(
        hidden_size=vit.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=image_size,
        patch_size=encoder.stride,
        hidden_act=activation(block.mlp.act),
        layer_norm_eps=block.norm1.eps,
    )
    side = image_size // encoder.stride
    places = resample_abs_pos_embed(vit.pos_embed, [side, side], list(vit.patch_embed.grid_size), num_prefix_tokens=0)
    return Tower(sizes, siglip_weights(vit) | {POSITIONS: places[0]})


def transformers_tower(encoder: TransformersEncoder, image_size: int) -> Tower:
    """Return the tower of a CLIP or SigLIP from `transformers`, up to the layer that is read."""
    config, weights = encoder.hf.config, dict(encoder.hf.state_dict())
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "hidden_act", "layer_norm_eps")
    sizes = {key: getattr(config, key) for key in same}
    sizes |= {"num_hidden_layers": encoder.layer + 1, "image_size": image_size}
    if encoder.resizes:
        places = encoder.num_patches(image_size) + encoder.has_class
        stand_in = torch.zeros(1, places, encoder.out_dim)
        weights[POSITIONS] = encoder.hf.embeddings.interpolate_pos_encoding(stand_in, image_size, image_size)[0]
    return Tower(sizes, weights | {f"post_layernorm.{key}": w for key, w in encoder.norm.state_dict().items()})


def activation(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.GELU):
        return "gelu_pytorch_tanh" if module.approximate == "tanh" else "gelu"
    known = {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "GELUTanhMlp": "gelu"}
    if name not in known:
        raise NoStockClass(f"encoder: {name} is not an activation of the stock class")
    return known[name]
