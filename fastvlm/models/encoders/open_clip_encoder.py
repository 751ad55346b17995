"""The image tower of an `open_clip` model as an encoder: CLIP, DFN, MetaCLIP and similar models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fastvlm.models.encoders.sizes import grid_of, layer_of, statistics
from fastvlm.models.hub import fetch


class OpenClipEncoder(nn.Module):
    """Encoder that returns the patches of one layer of an open_clip vision transformer.

    Modules that do not affect the patches (later layers, pooling, the text tower) are removed.

    Args:
        name: a model of `open_clip.list_models()`.
        pretrained: an open_clip tag (loaded from the hub), or a checkpoint file of the whole model; None: random
            weights.
        layer: layer whose output is taken, counted from 0, or from the end if negative; LLaVA uses -2.
        norm: apply the final norm after that layer; None: only if it is the last layer, as in the model itself.
        class_token: keep the class token, before the patches.
        mean, std: pixel statistics per channel, for values in [0, 1]; None: those of the checkpoint.
        image_size: side of the images in pixels; a pretrained model's positions are interpolated to it once. None: the
            model's own.
        interpolate: interpolate positions in every forward pass to the size of the images.
        gradient_checkpointing: recompute layers in the backward pass instead of keeping their activations.
        options: further arguments of `open_clip.create_model`.

    Raises:
        ValueError: no such model or layer, its weights cannot be loaded, or it is not a plain vision transformer;
            (forward, grid) an unsupported image size.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: str | None = None,
        layer: int = -1,
        norm: bool | None = None,
        class_token: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | None = None,
        interpolate: bool = False,
        gradient_checkpointing: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.name, self.class_token, self.interpolate = name, class_token, interpolate
        clip = fetch(
            lambda: open_clip.create_model(name, pretrained=pretrained, force_image_size=image_size, **options),
            what=f"encoder.name={name} with pretrained={pretrained}",
            mend="without the hub, set encoder.pretrained to a local checkpoint file of the whole model, or take a "
            "small option with random weights, such as encoder=clip_micro",
        )
        if not isinstance(clip.visual, VisionTransformer):
            raise ValueError(
                f"encoder.name={name} is not an open_clip vision transformer; use encoder=timm with its timm name"
            )
        self.visual: VisionTransformer = clip.visual
        depth = len(self.visual.transformer.resblocks)
        self.layer = layer_of(layer, depth, name=name)
        self.norm = self.layer == depth - 1 if norm is None else norm
        del self.visual.transformer.resblocks[self.layer + 1 :]
        self.visual.proj = None
        if not self.norm:
            self.visual.ln_post = nn.Identity()
        config = open_clip.get_model_preprocess_cfg(clip)
        self.mean, self.std = statistics(mean or config["mean"], std or config["std"], name=name)
        self.out_dim: int = self.visual.conv1.out_channels
        self.stride: int = self.visual.patch_size[0]
        self.image_size: int = self.visual.image_size[0]
        if gradient_checkpointing:
            self.visual.set_grad_checkpointing(True)

    def grid(self, image_size: int) -> tuple[int, int]:
        fixed = None if self.interpolate else self.image_size
        return grid_of(image_size, stride=self.stride, name=self.name, fixed=fixed, divides=self.interpolate)

    def num_patches(self, image_size: int) -> int:
        height, width = self.grid(image_size)
        return height * width + self.class_token

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        visual = self.visual
        x = rearrange(visual.conv1(images), "i d h w -> i (h w) d")
        first = repeat(visual.class_embedding, "d -> i 1 d", i=len(images)).to(x.dtype)
        x = torch.cat([first, x], dim=1) + self._positions([self.grid(size)[0] for size in images.shape[-2:]]).to(x)
        x = visual.ln_pre(visual.patch_dropout(x))
        x = visual.ln_post(visual.transformer(x))
        return x if self.class_token else x[:, 1:]

    def _positions(self, grid: list[int]) -> Float[Tensor, "1 N D"]:
        own = self.visual.positional_embedding[None]
        side = self.image_size // self.stride
        return own if grid == [side, side] else resample_abs_pos_embed(own, grid, [side, side], num_prefix_tokens=1)
