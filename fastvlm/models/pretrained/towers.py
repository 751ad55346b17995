"""Vision towers of pretrained models as encoders from normalised views to patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class Tower(nn.Module):
    """Base of the towers, which defines the grid of a square view.

    Args:
        hf: the tower built by `transformers`.
        mean, std: pixel statistics it was trained with, for values in [0, 1].
        patch: side of a patch in pixels.
        out_dim: width of the patches.
        image_size: the only supported side of a view in pixels; None: any multiple of `multiple`.
        multiple: required divisor of the side, in pixels; None: `patch`.
    """

    def __init__(
        self,
        hf: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        patch: int,
        out_dim: int,
        image_size: int | None,
        multiple: int | None = None,
    ):
        super().__init__()
        self.hf, self.mean, self.std = hf, tuple(mean), tuple(std)
        self.patch, self.out_dim, self.image_size, self.multiple = patch, out_dim, image_size, multiple or patch

    def grid(self, image_size: int) -> tuple[int, int]:
        if self.image_size not in (None, image_size):
            raise ValueError(
                f"image_size={image_size}, but this model has positions for {self.image_size}; "
                f"set the stage's image_size={self.image_size}, or null for the model's own"
            )
        if self.image_size is None and image_size % self.multiple:
            raise ValueError(f"image_size={image_size} is not a multiple of this model's {self.multiple} pixels")
        return image_size // self.patch, image_size // self.patch

    def num_patches(self, image_size: int) -> int:
        height, width = self.grid(image_size)
        return height * width

    def check(self, images: Tensor) -> None:
        for size in images.shape[-2:]:
            self.grid(size)


class LayerTower(Tower):
    """CLIP or SigLIP, with the outputs of chosen layers concatenated (LLaVA, arXiv 2310.03744, uses layer -2).

    Layers after the last chosen one, and unused norm and head, are detached, because nothing reads them. `whole` puts
    them back for saving.

    Args:
        layers: indexes as in `transformers`' hidden states: 0 is the embedding, -1 the last layer's output.
        class_token: keep CLIP's class token; refused, because it has no place in the grid.
        norm: apply the tower's final norm to the last chosen layer's output (PaliGemma).
    """

    def __init__(self, hf: nn.Module, *, layers: Sequence[int], class_token: bool, norm: bool = False, **sizes):
        config = hf.config
        super().__init__(hf, out_dim=config.hidden_size * len(layers), patch=config.patch_size, **sizes)
        depth = len(hf.encoder.layers)
        if any(not -depth - 1 <= layer <= depth for layer in layers):
            raise ValueError(f"vision_feature_layer={list(layers)}, but the vision tower has {depth} layers")
        self.layers, self.norm = [layer % (depth + 1) for layer in layers], norm
        has_class = hasattr(hf.embeddings, "class_embedding")
        self.skip = 1 if has_class and not class_token else 0
        if has_class and class_token:
            raise ValueError("vision_feature_select_strategy=full keeps a class token, which has no place in the grid")
        aside = {"encoder.layers": hf.encoder.layers[max(self.layers) :]}
        hf.encoder.layers = hf.encoder.layers[: max(self.layers)]
        for name in ("post_layernorm", "head"):
            if isinstance(part := getattr(hf, name, None), nn.Module) and not (norm and name == "post_layernorm"):
                aside[name] = part
                setattr(hf, name, nn.Identity())
        self._aside = (aside,)  # in a tuple, so that they are not registered as submodules

    def whole(self) -> nn.Module:
        """Put the detached modules back and return the complete tower; this encoder must not be used afterwards."""
        for name, part in self._aside[0].items():
            if name == "encoder.layers":
                self.hf.encoder.layers.extend(part)
            else:
                setattr(self.hf, name, part)
        return self.hf

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        self.check(images)
        hidden = self.hf.embeddings(images)
        if hasattr(self.hf, "pre_layrnorm"):
            hidden = self.hf.pre_layrnorm(hidden)
        states = [hidden]
        for layer in self.hf.encoder.layers:
            states.append(layer(states[-1], attention_mask=None))
        if self.norm:
            states[-1] = self.hf.post_layernorm(states[-1])
        return torch.cat([states[layer][:, self.skip :] for layer in self.layers], dim=-1)


class WholeTower(Tower):
    """A tower whose final output is used: SigLIP of Idefics3 and SmolVLM (arXiv 2408.12637), or a timm model."""

    def whole(self) -> nn.Module:
        return self.hf

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        self.check(images)
        hidden = self.hf(images).last_hidden_state
        return hidden if hidden.ndim == 3 else rearrange(hidden, "i d h w -> i (h w) d")


class Qwen2VLTower(Tower):
    """Qwen2-VL's tower (arXiv 2409.12191) without its merger; patches are ordered by the blocks to be merged."""

    def __init__(self, hf: nn.Module, **sizes):
        config = hf.config
        self_merge = config.spatial_merge_size
        super().__init__(
            hf, out_dim=config.embed_dim, patch=config.patch_size, multiple=config.patch_size * self_merge, **sizes
        )
        self.merge, self.frames = self_merge, config.temporal_patch_size

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I N D"]:
        self.check(images)
        height, width = self.grid(images.shape[-1])
        # Patches span several frames, so a still image is repeated as that many.
        patches = rearrange(
            images[:, :, None].expand(-1, -1, self.frames, -1, -1),
            "i c t (h a p) (w b q) -> (i h w a b) (c t p q)",
            a=self.merge,
            b=self.merge,
            p=self.patch,
            q=self.patch,
        )
        grid = torch.tensor([[1, height, width]], device=images.device).expand(len(images), -1)
        hidden = self.hf(patches, grid_thw=grid).last_hidden_state
        return rearrange(hidden, "(i n) d -> i n d", i=len(images))

    def in_order(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I N D"]:
        """Return the patches in row-major order."""
        side = int(patches.shape[1] ** 0.5) // self.merge
        return rearrange(patches, "i (h w a b) d -> i (h a w b) d", h=side, a=self.merge, b=self.merge)
