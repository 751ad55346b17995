"""From an encoded image to pixels: decode, resize with the aspect kept, pad to a square."""

from __future__ import annotations

import io

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

# The mean of ImageNet: about zero after every encoder's normalisation, so padding says nothing.
PADDING = (124, 116, 104)
MAX_PIXELS = 64_000_000  # an image that unpacks to more than 192 MB is taken for a decompression bomb


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image without decoding it.

    Raises:
        ValueError: not an image, or one of more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image of {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image


def decode_image(data: bytes, image_size: int) -> UInt8[Tensor, "3 H W"]:
    """Decode to a square of `image_size` pixels: longer side resized (bilinear, antialiased), shorter side padded.

    A transparent image is laid on white; a photograph is turned as its EXIF orientation says.

    Raises:
        ValueError: the file is broken or too large.
    """
    image = open_image(data)
    try:
        if image.format == "JPEG":
            # Scaled decoding skips work far beyond the target; twice the target leaves the resize its antialiasing.
            image.draft("RGB", (2 * image_size, 2 * image_size))
        if image.format != "PNG":
            image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"broken image: {error}") from None
    width, height = image.size
    if max(width, height) != image_size:
        scale = image_size / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if width != height:
        square = Image.new("RGB", (image_size, image_size), PADDING)
        square.paste(image, ((image_size - width) // 2, (image_size - height) // 2))
        image = square
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").contiguous()


def decode_label_map(data: bytes) -> UInt8[Tensor, "C h w"]:
    """Decode a dense label map as it is, one channel a label set; it is never resized.

    Raises:
        ValueError: the file is broken.
    """
    try:
        pixels = np.array(open_image(data).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"broken label map: {error}") from None
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous()
