"""Any image model of `timm` as an encoder; FastVLM's FastViTHD is its `fastvit_mci3`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.models.encoders.checkpoint import load_weights
from fastvlm.models.encoders.sizes import grid_of, layer_of, statistics
from fastvlm.models.hub import fetch


class TimmEncoder(nn.Module):
    """Encoder that returns the patches of one layer of a timm model, without register tokens.

    Modules that do not affect the patches (classifier, pooling, later layers) are removed.

    Args:
        name: a model of `timm.list_models()`, or `name.tag` for one of its checkpoints.
        pretrained: load timm's weights of that name from the hub.
        checkpoint: load these weights instead: a .safetensors or .pt file of the model itself, of a larger model that
            contains it under some prefix (a CLIP, a whole VLM), or in the format it was published in.
        layer: transformer block whose output is taken, counted from 0, or from the end if negative; LLaVA uses -2.
            Convolutional and hybrid models support only -1, the end.
        norm: apply the transformer's final norm after that layer; None: only if it is the last layer, as in the model
            itself.
        class_token: keep the class token, before the patches.
        mean, std: pixel statistics per channel, for values in [0, 1]; None: those of timm's checkpoint.
        image_size: image side in pixels for which a transformer has positions; those of a checkpoint are interpolated
            to it once. None: the model's own.
        interpolate: interpolate positions in every forward pass to the size of the images.
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        options: further arguments of `timm.create_model`, e.g. `embed_dim`, `depth`.

    Raises:
        ValueError: no such model or layer, its weights cannot be loaded or do not fit, or an argument does not apply to
            it; (forward, grid) an unsupported image size.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        checkpoint: str | None = None,
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
        self.name, self.class_token = name, class_token
        if image_size is not None:
            options["img_size"] = image_size
        if interpolate:
            options["dynamic_img_size"] = True
        self.options = dict(options)
        from_hub = pretrained and checkpoint is None
        self.model = fetch(
            lambda: timm.create_model(name, pretrained=from_hub, num_classes=0, **options),
            what=f"encoder.name={name} with pretrained={pretrained}",
            mend="without the hub, set encoder.checkpoint to a local file of its weights, or take a small option with "
            "random ones, such as encoder=clip_micro",
        )
        config = self.model.pretrained_cfg
        self.mean, self.std = statistics(mean or config["mean"], std or config["std"], name=name)
        self.out_dim: int = self.model.num_features
        if all(hasattr(self.model, key) for key in ("blocks", "patch_embed", "norm", "num_prefix_tokens")):
            self._take_layer(layer, norm)
        else:
            self._refuse_for_maps(layer=layer != -1, norm=norm is not None, class_token=class_token)
            self.layer, self.norm, self.num_prefix, self.image_size = None, True, 0, None
            self.model.head = nn.Identity()
            self.stride = self.model.feature_info[-1]["reduction"]
            self.divides = True
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        if gradient_checkpointing:
            self.model.set_grad_checkpointing(True)

    def _take_layer(self, layer: int, norm: bool | None) -> None:
        model = self.model
        depth = len(model.blocks)
        self.layer = layer_of(layer, depth, name=self.name)
        self.norm = self.layer == depth - 1 if norm is None else norm
        self.num_prefix: int = model.num_prefix_tokens
        if self.class_token and getattr(model, "cls_token", None) is None:
            raise ValueError(f"encoder.class_token=true, but {self.name} has no class token; set it to false")
        model.reset_classifier(0, "")
        # fc_norm normally follows pooling, but in models that pool by the mean it is the only final norm.
        if self.norm and isinstance(model.norm, nn.Identity):
            model.norm = getattr(model, "fc_norm", model.norm)
        model.fc_norm = nn.Identity()
        del model.blocks[self.layer + 1 :]
        if not self.norm:
            model.norm = nn.Identity()
        embed = model.patch_embed
        self.stride = embed.patch_size[0]
        fixed = getattr(embed, "strict_img_size", True) and embed.img_size is not None
        self.image_size: int | None = embed.img_size[0] if fixed else None
        # SigLIP's 384 pixels are 27 patches of 14 pixels with a remainder, which its patches do not cover.
        self.divides = not fixed

    def _refuse_for_maps(self, **given: bool) -> None:
        for key in [key for key, set_ in given.items() if set_]:
            raise ValueError(f"encoder.{key}: {self.name} is not a plain transformer and has none; leave the key out")

    def grid(self, image_size: int) -> tuple[int, int]:
        return grid_of(image_size, stride=self.stride, name=self.name, fixed=self.image_size, divides=self.divides)

    def num_patches(self, image_size: int) -> int:
        height, width = self.grid(image_size)
        return height * width + self.class_token

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        for size in images.shape[-2:]:
            self.grid(size)
        features = self.model.forward_features(images.contiguous(memory_format=torch.channels_last))
        if self.layer is None:
            return rearrange(channels_first(features, self.out_dim), "i d h w -> i (h w) d")
        patches = features[:, self.num_prefix :]
        return torch.cat([features[:, :1], patches], dim=1) if self.class_token else patches

    # ------------------------------------------------------------------------------- stages, of models that have them

    @property
    def stage_dims(self) -> list[int]:
        """Width of each stage's map. Raises ValueError if the model has no stages."""
        return [info["num_chs"] for info in self._stages()]

    @property
    def stage_strides(self) -> list[int]:
        """Stride of each stage's map in pixels."""
        return [info["reduction"] for info in self._stages()]

    def advance(self, stage: int, x: Float[Tensor, "I C H W"]) -> Float[Tensor, "I D h w"]:
        """Compute the map of stage i from that of stage i - 1, or from images."""
        if stage == 0:
            x = self.model.stem(x.contiguous(memory_format=torch.channels_last))
        return self.model.stages[stage](x)

    def finish(self, x: Float[Tensor, "I C h w"]) -> Float[Tensor, "I D h w"]:
        """Apply the model's final convolution or norm, if it has one, to the map of the last stage."""
        return getattr(self.model, "final_conv", getattr(self.model, "norm_pre", nn.Identity()))(x)

    def _stages(self) -> list[dict]:
        if not all(hasattr(self.model, part) for part in ("stem", "stages")):
            raise ValueError(
                f"encoder.name={self.name} has no stages; choose one that has, such as fastvithd or convnext"
            )
        return self.model.feature_info

    @torch.no_grad()
    def reparameterize(self) -> TimmEncoder:
        """Fold branches and norms of a model that has them (FastViT), in place, for inference."""
        timm.models.reparameterize_model(self.eval().model, inplace=True)
        return self


def channels_first(features: Tensor, dim: int) -> Float[Tensor, "I D h w"]:
    """Return the map with channels first; timm's hierarchical transformers (Swin) put them last."""
    return features if features.shape[1] == dim else rearrange(features, "i h w d -> i d h w")
