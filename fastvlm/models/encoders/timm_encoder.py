"""Any image model of `timm` as an encoder; FastViTHD, FastVLM's own, is its `fastvit_mci3`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.hub import fetch


class TimmEncoder(nn.Module):
    """Patches of `forward_features`, without class or register tokens, normalised as the model was trained.

    Args:
        name: a model of `timm.list_models()`.
        pretrained: load timm's weights of that name from the hub.
        checkpoint: load these weights instead: a .safetensors or .pt file of the model itself, or of a larger one that
            holds it below some prefix (a CLIP, a whole VLM). A classifier in it is left out.
        mean, std: of the images it was trained on, where the weights are not those timm has in mind.
        options: of `timm.create_model`, e.g. `img_size` or `dynamic_img_size` for a vision transformer.

    Raises:
        ValueError: no such model, or its weights are not to be had; (forward, grid) an image size it cannot take.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        checkpoint: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.name = name
        from_hub = pretrained and checkpoint is None
        self.model = fetch(
            lambda: timm.create_model(name, pretrained=from_hub, num_classes=0, **options),
            what=f"encoder.name={name} with pretrained={pretrained}",
            mend="without the hub, set encoder.checkpoint to a local file of its weights",
        )
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        config = self.model.pretrained_cfg
        self.mean, self.std = tuple(mean or config["mean"]), tuple(std or config["std"])
        self.out_dim: int = self.model.num_features
        self.num_prefix = getattr(self.model, "num_prefix_tokens", 0)
        embed = getattr(self.model, "patch_embed", None)
        if hasattr(embed, "patch_size"):
            self.stride = embed.patch_size[0]
            fixed = getattr(embed, "strict_img_size", False) and embed.img_size is not None
            self.image_size: int | None = embed.img_size[0] if fixed else None
        else:
            self.stride, self.image_size = self.model.feature_info[-1]["reduction"], None

    def grid(self, image_size: int) -> tuple[int, int]:
        if self.image_size not in (None, image_size):
            raise ValueError(
                f"image_size={image_size}, but {self.name} has positions for {self.image_size}; "
                f"set encoder.img_size={image_size} to interpolate them"
            )
        if image_size % self.stride:
            raise ValueError(f"image_size={image_size} is not a multiple of the {self.stride} pixels of {self.name}")
        return image_size // self.stride, image_size // self.stride

    def num_patches(self, image_size: int) -> int:
        height, width = self.grid(image_size)
        return height * width

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        for size in images.shape[-2:]:
            self.grid(size)
        features = self.model.forward_features(images.contiguous(memory_format=torch.channels_last))
        if features.ndim == 3:
            return features[:, self.num_prefix :]
        # Hierarchical transformers of timm (Swin) put channels last, convolutional models first.
        order = "i d h w -> i (h w) d" if features.shape[1] == self.out_dim else "i h w d -> i (h w) d"
        return rearrange(features, order)


def load_weights(model: nn.Module, path: str) -> None:
    """Strict but for a classifier, from a state dict that holds the model's own keys below any one prefix."""
    state = fetch(
        lambda: timm.models.load_state_dict(path),
        what=f"encoder.checkpoint={path}",
        mend="name a .safetensors or .pt file of its weights",
    )
    wanted = model.state_dict()
    first = next(iter(wanted))
    held = [key.removesuffix(first) for key in state if key == first or key.endswith("." + first)]
    if not held:
        raise ValueError(f"encoder.checkpoint={path} holds no {first}: these are not weights of this model")
    own = {key.removeprefix(held[0]): value for key, value in state.items() if key.startswith(held[0])}
    if missing := [key for key in wanted if key not in own]:
        raise ValueError(
            f"encoder.checkpoint={path} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]} the first"
        )
    model.load_state_dict({key: own[key] for key in wanted})
