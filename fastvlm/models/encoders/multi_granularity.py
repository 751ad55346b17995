"""Two encoders for two granularities: one per kind of view as in Ferret-v2 (arXiv 2404.07973, section 3.2), or fused.

Ferret-v2 encodes the global view with CLIP, F_g = CLIP(I_g), and the tiles with DINOv2, F_l = DINOv2(I_l). Each has its
own projector, H_g = MLP_g(F_g) and H_l = MLP_l(F_l), because the two encoders see images of different granularity and
were trained on different objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastvlm.models.norms import frozen_statistics

FUSIONS = ("views", "concat", "sum", "attention")


class MultiGranularityEncoder(nn.Module):
    """A coarse and a fine encoder whose patches share one width; each applies its own pixel statistics.

    Args:
        coarse: encoder of global views; CLIP in Ferret-v2.
        fine: encoder of tiles; DINOv2 in Ferret-v2.
        fusion: `views`: global views go through `coarse`, tiles through `fine`, each followed by its own MLP. The other
            fusions run both encoders on every view: `concat` concatenates channels before one MLP, `sum` adds the
            outputs of both MLPs, `attention` adds cross-attention from coarse patches to fine ones.
        dim: width of the patches; None: that of `coarse`.
        heads: attention heads of `fusion=attention`.

    Attributes:
        reads_views: whether `forward` needs `is_tile`.

    Raises:
        ValueError: an unknown fusion, or `heads` does not divide the width; (num_patches, forward) the encoders'
            numbers of patches do not fit the fusion.
    """

    mean: Sequence[float] = (0.0, 0.0, 0.0)  # the VLM only scales to [0, 1]; forward normalises for each encoder
    std: Sequence[float] = (1.0, 1.0, 1.0)

    def __init__(
        self, coarse: nn.Module, fine: nn.Module, *, fusion: str = "views", dim: int | None = None, heads: int = 8
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"encoder.fusion={fusion} is not one of {', '.join(FUSIONS)}")
        self.coarse, self.fine, self.fusion = coarse, fine, fusion
        self.out_dim = coarse.out_dim if dim is None else dim
        self.reads_views = fusion == "views"
        for name, encoder in (("coarse", coarse), ("fine", fine)):
            for key in ("mean", "std"):
                values = torch.tensor(getattr(encoder, key)).view(1, 3, 1, 1)
                self.register_buffer(f"{name}_{key}", values, persistent=False)
        if fusion == "concat":
            self.both = mlp(coarse.out_dim + fine.out_dim, self.out_dim)
        else:
            self.coarse_mlp, self.fine_mlp = mlp(coarse.out_dim, self.out_dim), mlp(fine.out_dim, self.out_dim)
        if fusion == "attention":
            if self.out_dim % heads:
                raise ValueError(f"encoder.heads={heads} does not divide the width {self.out_dim} (encoder.dim)")
            self.ask, self.answer = nn.LayerNorm(self.out_dim), nn.LayerNorm(self.out_dim)
            self.attention = nn.MultiheadAttention(self.out_dim, heads, batch_first=True)

    def grid(self, image_size: int) -> tuple[int, int]:
        return self.coarse.grid(image_size)

    def num_patches(self, image_size: int) -> int:
        coarse, fine = self.coarse.num_patches(image_size), self.fine.num_patches(image_size)
        if self.fusion == "views" and coarse != fine:
            raise ValueError(
                f"encoder: a global view has {coarse} patches and a tile {fine} at image_size={image_size}, but every "
                "view must have as many; choose encoders of one patch size, or encoder.fusion=attention"
            )
        for name, encoder, number in (("coarse", self.coarse, coarse), ("fine", self.fine, fine)):
            height, width = encoder.grid(image_size)
            if self.fusion in ("concat", "sum") and number != height * width:
                raise ValueError(
                    f"encoder.{name} yields {number} patches, {height} x {width} and a class token; "
                    f"fusion={self.fusion} lays maps on each other: set encoder.{name}.class_token=false"
                )
        return coarse

    def forward(
        self, images: Float[Tensor, "I 3 H W"], is_tile: Bool[Tensor, "I"] | None = None
    ) -> Float[Tensor, "I N D"]:
        """Encode views; `is_tile` None means that every view is a global one."""
        n = self.num_patches(images.shape[-1])
        if self.fusion == "views":
            if is_tile is None:
                return torch.cat([self._coarse(images), self._fine(images[:0])])
            coarse, fine = self._coarse(images[~is_tile]), self._fine(images[is_tile])
            out = images.new_zeros(len(images), n, self.out_dim, dtype=coarse.dtype)
            out[~is_tile], out[is_tile] = coarse, fine.to(coarse.dtype)
            return out
        coarse, fine = self.normalised(images, "coarse"), self.normalised(images, "fine")
        coarse, fine = self.coarse(coarse), self.fine(fine)
        if self.fusion == "attention":
            coarse, fine = self.coarse_mlp(coarse), self.answer(self.fine_mlp(fine))
            return coarse + self.attention(self.ask(coarse), fine, fine, need_weights=False)[0]
        here, there = self.coarse.grid(images.shape[-1]), self.fine.grid(images.shape[-1])
        if here != there:
            fine = rearrange(fine, "i (h w) d -> i d h w", h=there[0])
            fine = rearrange(F.interpolate(fine, size=here, mode="bilinear"), "i d h w -> i (h w) d")
        if self.fusion == "concat":
            return self.both(torch.cat([coarse, fine], dim=-1))
        return self.coarse_mlp(coarse) + self.fine_mlp(fine)

    def normalised(self, images: Float[Tensor, "I 3 H W"], name: str) -> Float[Tensor, "I 3 H W"]:
        mean, std = (getattr(self, f"{name}_{key}").to(images.dtype) for key in ("mean", "std"))
        return (images - mean) / std

    def _coarse(self, images: Tensor) -> Tensor:
        return self._branch(self.coarse, self.coarse_mlp, self.normalised(images, "coarse"))

    def _fine(self, images: Tensor) -> Tensor:
        return self._branch(self.fine, self.fine_mlp, self.normalised(images, "fine"))

    def _branch(self, encoder: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        """Return `head(encoder(images))`, in training with all their parameters in the graph even without views.

        Otherwise another rank that has such views would wait for this rank's gradients.
        """
        if len(images):
            return head(encoder(images))
        if not (self.training and torch.is_grad_enabled()):
            return images.new_zeros(0, encoder.num_patches(images.shape[-1]), self.out_dim)
        with frozen_statistics(encoder):
            out = head(encoder(images.new_zeros(1, *images.shape[1:])))
        return out[:0] + out.sum() * 0.0

    def reparameterize(self) -> MultiGranularityEncoder:
        """Fold the branches of those encoders that have some, in place, for inference."""
        for encoder in (self.coarse, self.fine):
            if hasattr(encoder, "reparameterize"):
                encoder.reparameterize()
        return self.eval()


def mlp(in_dim: int, out_dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
