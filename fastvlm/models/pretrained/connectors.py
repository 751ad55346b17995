"""Projectors and resamplers of pretrained models, and how they arrange the visual tokens of several views."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class Connector(nn.Module):
    """A projector of `transformers`, with the newline vector that ends a row of tokens, if the model has one."""

    def __init__(self, hf: nn.Module, *, out_dim: int, newline: nn.Parameter | None = None):
        super().__init__()
        self.hf, self.out_dim = hf, out_dim
        self.register_parameter("newline", newline)

    def forward(self, tokens: Float[Tensor, "I M D_v"]) -> Float[Tensor, "I M D_t"]:
        return self.hf(tokens)


class MergerConnector(Connector):
    """Qwen2-VL's merger: normalises every patch, concatenates the patches of a block, and projects."""

    def forward(self, tokens: Float[Tensor, "I M D_v"]) -> Float[Tensor, "I M D_t"]:
        norm = self.hf.ln_q.weight.shape[0]
        merged = self.hf(rearrange(tokens, "i m (g d) -> (i m g) d", d=norm))
        return rearrange(merged, "(i m) d -> i m d", i=len(tokens))


class BlockResampler(nn.Module):
    """Concatenates every `factor`^2 consecutive patches, which the tower already orders by block."""

    def __init__(self, *, in_dim: int, factor: int):
        super().__init__()
        self.factor, self.out_dim = factor, in_dim * factor**2

    def num_tokens_out(self, num_patches: int) -> int:
        return num_patches // self.factor**2

    def forward(self, patches: Float[Tensor, "I N D"]) -> Float[Tensor, "I M D_out"]:
        return rearrange(patches, "i (m g) d -> i m (g d)", g=self.factor**2)


# ------------------------------------------------------------------------------------------- several views of one image
# An arrangement maps the visual tokens of an image's views (v, m, D), global view first, and the image's layout to the
# sequence (T, D) that the language model reads. Its `slots` is the largest number of slots a view needs.

Arrangement = Callable[[Tensor, tuple[int, int, int, int]], Tensor]


class SpatialUnpad:
    """Arrangement of LLaVA-NeXT and LLaVA-OneVision: the tiles as one unpadded map, a newline vector after every row.

    Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/ and arXiv 2408.03326; the lengths are those of
    `LlavaNextProcessor` and `LlavaOnevisionProcessor`.

    Args:
        newline: the newline vector (D,).
        max_tiles: maps with more than this many tiles' tokens are downsampled to about that many (9 for anyres_max_9);
            None: never.
        one_tile: whether an image with a 1 x 1 grid repeats its global view as its single tile.
    """

    def __init__(self, newline: nn.Parameter, *, max_tiles: int | None = None, one_tile: bool = False):
        self.newline, self.max_tiles, self.one_tile = newline, max_tiles, one_tile

    def slots(self, tokens: int) -> int:
        side = math.isqrt(tokens)
        return (tokens + side) * (2 if self.one_tile else 1)

    def __call__(self, views: Float[Tensor, "v m D"], layout: tuple[int, int, int, int] | None) -> Float[Tensor, "T D"]:
        newline = self.newline.to(views.dtype)
        if len(views) == 1 and not (self.one_tile and layout is not None):
            return torch.cat([views[0], newline[None]])
        rows, columns, height, width = layout
        side = math.isqrt(views.shape[1])
        tiles = views[1:] if len(views) > 1 else views
        grid = rearrange(tiles, "(r c) (h w) d -> d (r h) (c w)", r=rows, c=columns, h=side)
        grid = unpad(grid, height, width)
        if self.max_tiles is not None:
            ratio = math.sqrt(grid.shape[1] * grid.shape[2] / (self.max_tiles * side**2))
            if ratio > 1.1:
                size = [int(grid.shape[1] // ratio), int(grid.shape[2] // ratio)]
                grid = F.interpolate(grid[None], size, mode="bilinear")[0]
        lines = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)
        return torch.cat([views[0], rearrange(lines, "d h w -> (h w) d")])


def unpad(grid: Float[Tensor, "D h w"], height: int, width: int) -> Float[Tensor, "D h2 w2"]:
    """Remove rows or columns that contain only padding around a centred image of `height` x `width` pixels."""
    rows, columns = grid.shape[1:]
    if width / height > columns / rows:
        inside = int(round(height * (columns / width), 7))
        cut = (rows - inside) // 2
        return grid[:, cut : rows - cut]
    inside = int(round(width * (rows / height), 7))
    cut = (columns - inside) // 2
    return grid[:, :, cut : columns - cut]


class Separated:
    """Arrangement of Idefics3 and SmolVLM: text tokens before each tile name it, and the global view comes last.

    Args:
        words: maps (rows, columns) to the ids of an image with that grid, with `image_id` for each visual token.
        embed: maps ids to embeddings.
        image_id: the id of a visual token.
    """

    def __init__(self, words: Callable[[int, int], list[int]], *, embed: Callable[[Tensor], Tensor], image_id: int):
        self.words, self.embed, self.image_id = words, embed, image_id

    def slots(self, tokens: int) -> int:
        return tokens + 4  # two tokens before a view, one after the last view, one line end

    def __call__(self, views: Float[Tensor, "v m D"], layout: tuple[int, int, int, int] | None) -> Float[Tensor, "T D"]:
        rows, columns = (0, 0) if len(views) == 1 else layout[:2]
        ids = torch.tensor(self.words(rows, columns), device=views.device)
        ordered = torch.cat([views[1:], views[:1]]).flatten(0, 1)
        at = (ids == self.image_id).nonzero().squeeze(1)
        if len(at) != len(ordered):
            raise ValueError(
                f"an image of {rows} x {columns} tiles has {len(ordered)} visual tokens, but the model's processor "
                f"writes {len(at)} of them: its image_seq_len fits another image_size"
            )
        return self.embed(ids).to(ordered.dtype).index_copy(0, at, ordered)
