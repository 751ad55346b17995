"""From an encoded image to the square views that a model takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from fastvlm.data.augment import Augmentation, jitter_colours, mean_grey
from fastvlm.data.decode import (
    BROKEN,
    Opened,
    decode_pixels,
    is_jpeg,
    look_at,
    open_image,
    read_orientation,
    upright_size,
)
from fastvlm.data.encoded import EncodedImage
from fastvlm.data.tiling import check_grids, choose_grids

FITS = ("pad", "crop", "squash")
# The mean of ImageNet: about zero after every encoder's normalisation, so padding carries no signal.
PADDING = (124, 116, 104)
# A reduced decode must have at least this many times the target size. Compared with a full decode, the pixels of a
# photograph then differ by 0.5 of 255 on average and those of a page of text by 3; with a margin of 1, by 2 and 13.
MARGIN = 2
# From this reduction on, chroma that a JPEG stores at half the size is repeated instead of interpolated, since the
# resize averages it anyway. At worst the result is 3 % further from the uncompressed image, at best 11 % nearer.
REPEATED = 1.5
MAX_ROOM = 48 << 20  # bytes; largest decoding buffer that stays allocated

RESIZE_INTO = torch.ops.aten._upsample_bilinear2d_aa.out

Box = tuple[int, int, int, int]  # left, top, right, bottom


class ImageTransform:
    """Encoded image -> views: decoded, resized (bilinear, antialiased, on bytes) and fitted to squares.

    Without tiles, an image is one view. With tiles, it is a global view and, if its size calls for them, the tiles of
    one grid, row by row; in the tiles the image keeps its aspect ratio and the rest is padded.

    Args:
        image_size: side of a view, pixels.
        fit: how the whole image becomes a square: `pad` (the longer side fits, the rest is padded), `crop` (the shorter
            side fits, the centre is kept) or `squash` (both sides fit, the aspect ratio is lost).
        tiles: grids as (rows, columns), of which each image gets the best; None: no tiles.
        augment: augmentation for calls with a seed; None: none.
        padding: RGB colour of the padding, 0 to 255.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        fit: str = "pad",
        tiles: Sequence[Sequence[int]] | None = None,
        augment: Augmentation | None = None,
        padding: Sequence[int] = PADDING,
    ):
        if image_size < 1:
            raise ValueError(f"image_size={image_size} must be 1 or more")
        if fit not in FITS:
            near = difflib.get_close_matches(str(fit), FITS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"image.fit={fit} is not one of {', '.join(FITS)}{hint}")
        if len(padding) != 3 or not all(0 <= value <= 255 for value in padding):
            raise ValueError(f"image.padding={list(padding)} must be three bytes, 0 to 255")
        self.image_size, self.fit, self.padding = image_size, fit, tuple(padding)
        self.tiles = None if tiles is None else check_grids(tiles)
        self.augment = augment if augment is not None and augment.kinds else None
        longest = image_size * max((max(grid) for grid in self.tiles or ()), default=1)
        self._row = np.tile(np.array(self.padding, dtype=np.uint8), (1, longest, 1))
        self._scratch: Tensor | None = None
        self._room = np.empty(0, dtype=np.uint8)  # buffer for decoded pixels before the resize

    def restricted(self, kinds: Iterable[str]) -> ImageTransform:
        """Return the same transform with only these kinds of augmentation."""
        augment = self.augment.restricted(kinds) if self.augment else None
        return ImageTransform(
            image_size=self.image_size, fit=self.fit, tiles=self.tiles, augment=augment, padding=self.padding
        )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return (rows, columns) of the tiles of an image of this size; (1, 1) for none."""
        return (1, 1) if self.tiles is None else best_grid(width, height, self.image_size, self.tiles)

    def layout(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (rows, columns, height, width), which a model needs to reassemble the tiles of an image."""
        return *self.grid(width, height), height, width

    def num_views(self, width: int, height: int) -> int:
        """Return the number of views of an image of this size (upright, pixels)."""
        rows, columns = self.grid(width, height)
        return 1 if rows * columns == 1 else 1 + rows * columns

    def count_views(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Return `num_views` of many images: int32 (images,)."""
        if self.tiles is None:
            return np.ones(len(widths), dtype=np.int32)
        views = np.array([1 if r * c == 1 else 1 + r * c for r, c in self.tiles], dtype=np.int32)
        return views[choose_grids(widths, heights, image_size=self.image_size, grids=self.tiles)]

    def __call__(
        self,
        data: EncodedImage,
        *,
        seed: str | int | None = None,
        out: UInt8[Tensor, "v 3 H W"] | None = None,
        image: Opened | None = None,
    ) -> UInt8[Tensor, "v 3 H W"]:
        """Return the views of an encoded image, global view first.

        Args:
            data: the image file.
            seed: what augmentation is drawn from; None: no augmentation.
            out: where to write the views; None: fresh memory.
            image: what `look_at` returned for the data, if it has been called.

        Raises:
            ValueError: the file is broken or too large, or `out` has another number of views than the image.
        """
        image = image or look_at(data)
        orientation = read_orientation(image)
        width, height = upright_size(image, orientation)
        grid, side = self.grid(width, height), self.image_size
        views = 1 if grid == (1, 1) else 1 + grid[0] * grid[1]
        if out is None:
            out = empty_views(views, side)
        elif out.shape[0] != views:
            raise ValueError(f"image of {width} x {height} pixels has {views} views, and {len(out)} were planned")
        draw = self.augment.draw(seed) if self.augment is not None and seed is not None else None
        box = draw.crop(width, height) if draw else (0, 0, width, height)
        found = {"reducible": is_jpeg(image), "turned": orientation > 1}
        how, jobs = find_jobs(width, height, box, side=side, grid=grid, fit=self.fit, **found)
        pixels = decode_pixels(image, data, orientation, **how._asdict(), room=self._room_for(width * height))
        canvases = [out[0]]
        if views > 1:
            sheet = torch.empty(grid[0] * side, grid[1] * side, 3, dtype=torch.uint8)
            canvases.append(rearrange(sheet, "h w c -> c h w"))
        mean = None
        for job, canvas in zip(jobs, canvases):
            if not (draw and (draw.gains or draw.mirrored)):
                self._draw_on(canvas, pixels, job)
                continue
            resized = resize(pixels, job.box, job.size, scale=job.scale)
            if draw.gains:
                mean = mean_grey(resized) if mean is None else mean
                resized = jitter_colours(resized, draw.gains, mean=mean)
            self._place(resized.flip(-1) if draw.mirrored else resized, canvas)
        if views > 1:
            out[1:] = rearrange(canvases[1], "c (r h) (q w) -> (r q) c h w", r=grid[0], q=grid[1])
        out.view_layout = (*grid, height, width)  # for the inference engine; a Batch has `layouts`
        return out

    def _draw_on(self, canvas: Tensor, pixels: Tensor, job: Job) -> None:
        height, width = job.size
        if fills_rows(job.size, canvas):
            top = (canvas.shape[1] - height) // 2
            resize(pixels, job.box, job.size, scale=job.scale, out=canvas[:, top : top + height])
            self._pad_rows(canvas, top, top + height)
        else:
            self._place(resize(pixels, job.box, job.size, scale=job.scale, out=self._borrow(job.size)), canvas)

    def _room_for(self, num_pixels: int) -> np.ndarray:
        if self._room.size < 3 * num_pixels <= MAX_ROOM:
            self._room = np.empty(3 * num_pixels, dtype=np.uint8)
        return self._room

    def _borrow(self, size: tuple[int, int]) -> Tensor:
        """Return a reused buffer for a resized image: allocating fresh memory costs as much as the resize."""
        if self._scratch is None:
            self._scratch = torch.empty(3 * self._row.shape[1] ** 2, dtype=torch.uint8)
        return self._scratch[: 3 * size[0] * size[1]].view(*size, 3).permute(2, 0, 1)

    def _place(self, pixels: Tensor, canvas: Tensor) -> None:
        """Copy pixels into the middle of the canvas and pad around them."""
        height, width = pixels.shape[-2:]
        top, left = (canvas.shape[-2] - height) // 2, (canvas.shape[-1] - width) // 2
        # Rows of pixels are contiguous (channels last), so this copies whole rows, which numpy does faster.
        canvas, pixels = canvas.numpy().transpose(1, 2, 0), pixels.numpy().transpose(1, 2, 0)
        canvas[top : top + height, left : left + width] = pixels
        for bar in (canvas[:top], canvas[top + height :], canvas[:, :left], canvas[:, left + width :]):
            bar[:] = self._row[:, : bar.shape[1]]

    def _pad_rows(self, canvas: Tensor, top: int, bottom: int) -> None:
        """Pad the rows above `top`, and from `bottom` on."""
        rows, row = canvas.numpy().transpose(1, 2, 0), self._row[:, : canvas.shape[2]]
        rows[:top], rows[bottom:] = row, row


class Decoding(NamedTuple):
    """Options of `decode_pixels`."""

    reduce: int
    repeat_colour: bool


class Job(NamedTuple):
    """A part of the decoded pixels and its (height, width) on the canvas."""

    box: Box
    size: tuple[int, int]
    scale: tuple[float | None, float | None]  # see `scale_of`


@lru_cache(maxsize=1 << 12)
def find_jobs(
    width: int, height: int, box: Box, *, side: int, grid: tuple[int, int], fit: str, reducible: bool, turned: bool
) -> tuple[Decoding, list[Job]]:
    """Return how to decode an image, and which parts go into its global view and onto the sheet its tiles are cut from.

    Args:
        box: the part of the image that is used.
        reducible: it is a JPEG.
        turned: it is rotated or mirrored after decoding (EXIF orientation).
    """
    whole = central_square(box) if fit == "crop" else box
    parts = [(whole, fitted(whole, side, side) if fit == "pad" else (side, side))]
    if grid != (1, 1):
        parts.append((box, fitted(box, grid[0] * side, grid[1] * side)))
    shrinks = min(min((b[2] - b[0]) / w, (b[3] - b[1]) / h) for b, (h, w) in parts)
    reduce = largest_reduction(shrinks, whole=(width, height) if turned else (0, 0)) if reducible else 1
    sides = -(-height // reduce), -(-width // reduce)
    how = Decoding(reduce, repeat_colour=reduce == 1 and shrinks >= REPEATED)
    return how, [Job(shrunk(part, reduce, sides), size, scale_of(part, size, reduce)) for part, size in parts]


def fills_rows(size: tuple[int, int], canvas: Tensor) -> bool:
    """Return whether an image of this (height, width) is contiguous in the canvas, so it can be resized into place."""
    return size[1] == canvas.shape[2] and canvas.permute(1, 2, 0).is_contiguous()


def empty_views(count: int, image_size: int, *, shared: bool = False) -> UInt8[Tensor, "v 3 H W"]:
    """Return uninitialised views, channels last in memory, as decoders write them and encoders read them.

    Args:
        shared: in shared memory, so that a loader process need not copy them there.
    """
    num_bytes = 3 * count * image_size**2
    if shared:
        room = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(max(1, num_bytes)))
    else:
        room = torch.empty(num_bytes, dtype=torch.uint8)
    return lay_views(room, count, image_size)


def lay_views(room: UInt8[Tensor, " bytes"], count: int, image_size: int) -> UInt8[Tensor, "v 3 H W"]:
    """Return views at the start of existing memory."""
    views = room[: 3 * count * image_size**2].view(count, image_size, image_size, 3)
    return rearrange(views, "v h w c -> v c h w")


def decode_image(data: EncodedImage, image_size: int) -> UInt8[Tensor, "3 H W"]:
    """Return the single view of an image, padded to a square of `image_size` pixels.

    Raises:
        ValueError: the file is broken or too large.
    """
    return ImageTransform(image_size=image_size)(data)[0]


def decode_label_map(data: EncodedImage) -> UInt8[Tensor, "C h w"]:
    """Decode a dense label map, one channel per label set; it is never resized.

    Raises:
        ValueError: the file is broken.
    """
    image = open_image(data)
    try:
        pixels = np.array(image.convert("RGB"))
    except BROKEN as error:
        raise ValueError(f"broken label map: {error}") from None
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous()


@lru_cache(maxsize=1 << 16)
def best_grid(width: int, height: int, image_size: int, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return (rows, columns) of the best of `grids` for an image of this size."""
    (best,) = choose_grids(np.array([width]), np.array([height]), image_size=image_size, grids=grids)
    return grids[best]


def central_square(box: Box) -> Box:
    """Return the largest square in the middle of a box."""
    left, top, right, bottom = box
    side = min(right - left, bottom - top)
    left, top = left + (right - left - side) // 2, top + (bottom - top - side) // 2
    return left, top, left + side, top + side


def fitted(box: Box, height: int, width: int) -> tuple[int, int]:
    """Return the largest (height, width) of a box that fits, keeping its aspect ratio."""
    w, h = box[2] - box[0], box[3] - box[1]
    scale = min(width / w, height / h)
    return min(height, max(1, round(h * scale))), min(width, max(1, round(w * scale)))


def largest_reduction(shrinks: float, *, whole: tuple[int, int]) -> int:
    """Return the largest of 1, 2, 4, 8 that leaves MARGIN times the target size of what is scaled down `shrinks` times.

    It also divides `whole`, the sides of an image that is rotated: otherwise the last pixel, which lies partly outside
    the image, would become the first (cameras write multiples of 8).
    """
    room = shrinks / MARGIN
    return next(k for k in (8, 4, 2, 1) if k <= max(room, 1) and not any(side % k for side in whole))


def shrunk(box: Box, reduce: int, sides: tuple[int, int]) -> Box:
    """Return a box of the image in the pixels of its reduced decode of this (height, width); never empty."""
    height, width = sides
    left, top = min(box[0] // reduce, width - 1), min(box[1] // reduce, height - 1)
    return left, top, max(left + 1, min(-(-box[2] // reduce), width)), max(top + 1, min(-(-box[3] // reduce), height))


def scale_of(box: Box, size: tuple[int, int], reduce: int) -> tuple[float | None, float | None]:
    """Return the (height, width) scale of a part of the reduced decode; None where its size gives the scale.

    The last pixel of a reduced decode may lie partly outside the image: 261 pixels become 66 quarters, not 65.25.
    """
    sides = box[3] - box[1], box[2] - box[0]
    return tuple(None if side % reduce == 0 else target * reduce / side for side, target in zip(sides, size))


def resize(
    pixels: UInt8[Tensor, "3 h w"],
    box: Box,
    size: tuple[int, int],
    *,
    scale: Sequence[float | None] = (None, None),
    out: UInt8[Tensor, "3 H W"] | None = None,
) -> UInt8[Tensor, "3 H W"]:
    """Resize a part of an image to another (height, width). On bytes, torch gives the same result on every CPU.

    Args:
        scale: see `scale_of`.
        out: where to write it, channels last. Allocating a tensor and copying it would take half as long again.
    """
    part = pixels
    if box != (0, 0, pixels.shape[2], pixels.shape[1]):
        part = pixels[:, box[1] : box[3], box[0] : box[2]]
    if part.shape[1:] == size:
        return part if out is None else out.copy_(part)
    # This detour makes torch see that channels are last, so its output needs no transposition.
    part = part.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    # Called by `interpolate(mode="bilinear", antialias=True)`, which takes neither `out` nor a size with a scale.
    if out is None:
        return torch.ops.aten._upsample_bilinear2d_aa(part, size, False, *scale)[0]
    RESIZE_INTO(part, size, False, *scale, out=out[None])
    return out
