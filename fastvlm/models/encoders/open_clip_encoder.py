"""The image tower of an `open_clip` model as an encoder: CLIP, SigLIP, DFN, MetaCLIP and their like."""

from __future__ import annotations

from typing import Any

import open_clip
from jaxtyping import Float
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from fastvlm.models.hub import fetch


class OpenClipEncoder(nn.Module):
    """Patches of one layer of a vision transformer, without the class token, normalised as it was trained.

    Args:
        name: a model of `open_clip.list_models()`.
        pretrained: a tag of open_clip (from the hub), or a checkpoint file of the whole model; None: random weights.
        layer: which layer's output to take, from 0, or from the end; LLaVA takes the last but one, -2. There is no
            final norm behind it.
        image_size: side of the images; positions of a pretrained model are interpolated to it. None: the model's own.
        options: of `open_clip.create_model`.

    Raises:
        ValueError: no such model or layer, its weights are not to be had, or it is no plain vision transformer;
            (forward, grid) another image size.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: str | None = None,
        layer: int = -1,
        image_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        self.name = name
        clip = fetch(
            lambda: open_clip.create_model(name, pretrained=pretrained, force_image_size=image_size, **options),
            what=f"encoder.name={name} with pretrained={pretrained}",
            mend="without the hub, set encoder.pretrained to a local checkpoint file",
        )
        if not isinstance(clip.visual, VisionTransformer):
            raise ValueError(
                f"encoder.name={name} is no open_clip vision transformer; use encoder=timm with its timm name"
            )
        self.visual: VisionTransformer = clip.visual
        depth = len(self.visual.transformer.resblocks)
        if not -depth <= layer < depth:
            raise ValueError(f"encoder.layer={layer}, but {name} has {depth} layers")
        self.layer = layer % depth
        # Layers above the one that is taken, the pooling and the text tower would be frozen weight that nothing reads.
        del self.visual.transformer.resblocks[self.layer + 1 :]
        self.visual.ln_post, self.visual.proj = nn.Identity(), None
        config = open_clip.get_model_preprocess_cfg(clip)
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.out_dim: int = self.visual.conv1.out_channels
        self.stride: int = self.visual.patch_size[0]
        self.image_size: int = self.visual.image_size[0]

    def grid(self, image_size: int) -> tuple[int, int]:
        if image_size != self.image_size:
            raise ValueError(
                f"image_size={image_size}, but {self.name} has positions for {self.image_size}; "
                f"set encoder.image_size={image_size} to interpolate them"
            )
        return image_size // self.stride, image_size // self.stride

    def num_patches(self, image_size: int) -> int:
        height, width = self.grid(image_size)
        return height * width

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        for size in images.shape[-2:]:
            self.grid(size)
        out = self.visual.forward_intermediates(
            images, indices=[self.layer], intermediates_only=True, output_fmt="NLC", stop_early=True
        )
        return out["image_intermediates"][0]
