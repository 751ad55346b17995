"""A vision transformer of `transformers` as an encoder: CLIP, SigLIP, DINOv2 and others, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from fastvlm.models.encoders.sizes import grid_of, layer_of, statistics
from fastvlm.models.hub import fetch, known_config, refuse_incomplete


class TransformersEncoder(nn.Module):
    """Encoder that returns the patches of one layer of a vision transformer, without register tokens.

    Modules that do not affect the patches (later layers, pooling, mask token) are removed.

    Args:
        hf: the vision tower, e.g. `CLIPVisionModel`, `SiglipVisionModel`, `Dinov2Model`.
        layer: layer whose output is taken, counted from 0, or from the end if negative; LLaVA uses -2.
        norm: apply the final norm after that layer; None: only if it is the last layer.
        class_token: keep the class token, before the patches.
        mean, std: pixel statistics it was or will be trained with, per channel, for values in [0, 1].
        image_size: side of the images in pixels; the model's positions are interpolated to it. None: the model's own.
        interpolate: interpolate positions to the size of the images.
        gradient_checkpointing: recompute layers in the backward pass instead of keeping their activations.

    Raises:
        ValueError: not a plain vision transformer, no such layer, or no class token; (forward, grid) an unsupported
            image size.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        *,
        layer: int = -1,
        norm: bool | None = None,
        class_token: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | None = None,
        interpolate: bool = False,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.name, self.class_token, self.interpolate = hf.config.model_type, class_token, interpolate
        if gradient_checkpointing:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.mean, self.std = statistics(mean, std, name=self.name)
        blocks = next((m for n, m in hf.named_modules() if n.split(".")[-1] in ("layer", "layers")), None)
        final = next((name for name in ("post_layernorm", "layernorm", "norm") if hasattr(hf, name)), None)
        sized = all(hasattr(hf.config, key) for key in ("hidden_size", "image_size", "patch_size"))
        if not isinstance(blocks, nn.ModuleList) or final is None or not sized:
            raise ValueError(
                f"encoder: {self.name} is not a plain vision transformer of transformers; use encoder=timm"
            )
        self.layer = layer_of(layer, len(blocks), name=self.name)
        keep = self.layer == len(blocks) - 1 if norm is None else norm
        del blocks[self.layer + 1 :]
        # Some towers return the last layer's output after the norm, some before it, so the norm is applied here.
        self.norm = getattr(hf, final) if keep else nn.Identity()
        setattr(hf, final, nn.Identity())
        self.has_class = any(hasattr(hf.embeddings, token) for token in ("cls_token", "class_embedding"))
        if class_token and not self.has_class:
            raise ValueError(f"encoder.class_token=true, but {self.name} has no class token; set it to false")
        leave_out_unread(hf)
        self.hf = hf
        self.num_prefix = self.has_class + getattr(hf.config, "num_register_tokens", 0)
        self.out_dim: int = hf.config.hidden_size
        self.stride, own = (v if isinstance(v, int) else v[0] for v in (hf.config.patch_size, hf.config.image_size))
        self.image_size = image_size or own
        self.resizes = interpolate or self.image_size != own
        # Towers with a table of positions interpolate it only on request; the others always do.
        asks = "interpolate_pos_encoding" in signature(hf.forward).parameters
        self.leave = {"interpolate_pos_encoding": True} if asks and self.resizes else {}

    def grid(self, image_size: int) -> tuple[int, int]:
        fixed = None if self.interpolate else self.image_size
        return grid_of(image_size, stride=self.stride, name=self.name, fixed=fixed, divides=self.resizes)

    def num_patches(self, image_size: int) -> int:
        height, width = self.grid(image_size)
        return height * width + self.class_token

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        for size in images.shape[-2:]:
            self.grid(size)
        hidden = self.norm(self.hf(images, **self.leave).last_hidden_state)
        patches = hidden[:, self.num_prefix :]
        return torch.cat([hidden[:, :1], patches], dim=1) if self.class_token else patches


def leave_out_unread(hf: PreTrainedModel) -> None:
    """Remove pooling layers and the mask token, on which no patch depends."""
    if hasattr(hf, "head"):
        hf.use_head, hf.head = False, None
    if hasattr(hf, "pooler"):
        hf.pooler = None
    if getattr(hf.embeddings, "mask_token", None) is not None:
        hf.embeddings.mask_token = None


def from_config(model_type: str, *, config: Mapping[str, Any], **options: Any) -> TransformersEncoder:
    """Build an encoder with random weights.

    Args:
        model_type: a vision tower `transformers.AutoConfig` knows: clip_vision_model, siglip_vision_model, dinov2, ...
        config: arguments of its configuration, e.g. hidden_size, num_hidden_layers, image_size, patch_size.
        options: further arguments of `TransformersEncoder`; mean and std are required.

    Raises:
        ValueError: the type or an argument is unknown.
    """
    known = known_config(model_type, config, key="encoder")
    return TransformersEncoder(AutoModel.from_config(known), **options)


def from_pretrained(path: str, *, dtype: str = "float32", **options: Any) -> TransformersEncoder:
    """Load an encoder with pretrained weights; of a model with several towers (CLIP, SigLIP), the vision tower.

    Args:
        path: a folder that `save_pretrained` wrote, or a hub id.
        dtype: dtype of the weights in memory.
        options: further arguments of `TransformersEncoder`; mean and std default to the checkpoint's.

    Raises:
        ValueError: the model is found neither locally nor on the hub, or its weights are incomplete.
    """

    def build() -> tuple[PreTrainedModel, dict, dict]:
        whole = AutoConfig.from_pretrained(path)
        vision: PreTrainedConfig = getattr(whole, "vision_config", whole)
        cls = AutoModel._model_mapping[type(vision)]
        more = {"dtype": getattr(torch, dtype), "ignore_mismatched_sizes": True, "output_loading_info": True}
        return *cls.from_pretrained(path, config=vision, **more), image_statistics(path)

    mend = "name a folder with config.json and model.safetensors, a hub id while online, or take a small option with "
    what = f"encoder.path={path}"
    hf, info, stated = fetch(build, what=what, mend=mend + "random weights, such as encoder=clip_micro")
    encoder = TransformersEncoder(hf, **(stated | options))
    final = {"post_layernorm", "layernorm", "norm"} if not isinstance(encoder.norm, nn.Identity) else set()
    refuse_incomplete(info, {*hf.state_dict(), *(f"{n}.{w}" for n in final for w in ("weight", "bias"))}, what=what)
    return encoder


def image_statistics(path: str) -> dict[str, list[float]]:
    """Return `mean` and `std` from the checkpoint's image processor; empty if it has none."""
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(path)
    except OSError:
        return {}
    return {ours: processor[key] for ours, key in (("mean", "image_mean"), ("std", "image_std")) if key in processor}
