"""From an encoded image to upright RGB bytes: limits first, then the fastest decoder that gives the same picture.

The header is read before any pixel, so an image that would unpack to gigabytes costs nothing. JPEGs are decoded by
simplejpeg's libjpeg-turbo, which can write into existing memory; those it refuses, by torchvision's, which gives the
same pixels. If a smaller size suffices, Pillow decodes a JPEG at 1/2, 1/4 or 1/8 of its size, leaving out high
frequencies. Pillow decodes all other formats.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastvlm.data.encoded import EncodedImage

MAX_PIXELS = 64_000_000  # an image that unpacks to more than 192 MB is treated as a decompression bomb
MAX_BYTES = 64 << 20  # of the file
# Not all formats that Pillow supports: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ORIENTATION = 0x0112  # EXIF tag
BROKEN = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, IndexError, KeyError, MemoryError, struct.error)


class TooLarge(ValueError):
    """An image of more than MAX_PIXELS or MAX_BYTES."""


@dataclass
class PlainJpeg:
    """The header of a JPEG without EXIF, with Pillow's attributes, read in a tenth of Pillow's time."""

    size: tuple[int, int]
    mode: str
    format: str = "JPEG"
    info: dict = field(default_factory=dict)


Opened = Image.Image | PlainJpeg


def look_at(data: EncodedImage) -> Opened:
    """Read the header of an image: like `open_image`, but faster for most photographs.

    Raises:
        ValueError: see `open_image`.
    """
    plain = read_jpeg_header(data) if len(data) <= MAX_BYTES else None
    if plain is None or plain.size[0] * plain.size[1] > MAX_PIXELS:
        return open_image(data)
    return plain


SOF, SOS, APP1, APP2 = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1, 0xE2
WITHOUT_PIXELS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart interval, comment, application data


def read_jpeg_header(data: EncodedImage) -> PlainJpeg | None:
    """Return size and mode from the frame header (ITU-T T.81, B.2); None if Pillow must take a closer look."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, found = 2, None
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == SOS:
            return found
        if marker in SOF:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if found is not None or bits != 8 or channels not in (1, 3) or not width or not height:
                return None
            found = PlainJpeg((width, height), "L" if channels == 1 else "RGB")
        elif marker not in WITHOUT_PIXELS or marker == APP1 or (marker == APP2 and data[at + 4 : at + 8] == b"MPF\0"):
            return None  # EXIF and XMP may hold an orientation; MPF means several images
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def open_image(data: EncodedImage) -> Image.Image:
    """Open an encoded image without decoding it.

    Raises:
        ValueError: not an image of FORMATS.
        TooLarge: one of more than MAX_PIXELS or MAX_BYTES.
    """
    if len(data) > MAX_BYTES:
        raise TooLarge(f"image file of {len(data)} bytes, more than {MAX_BYTES}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLarge(str(error)) from None
    except UnidentifiedImageError:  # Pillow's message contains a memory address
        raise ValueError(f"not an image that can be read: none of {', '.join(FORMATS)}") from None
    except BROKEN as error:
        raise ValueError(f"not an image: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise TooLarge(f"image of {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image


def read_orientation(image: Opened) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or it cannot be read."""
    # Pillow rotates a TIFF itself. Asked for metadata that a PNG does not have in front, it would decode all of it.
    if image.format == "TIFF" or not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp"}:
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except BROKEN:
        return 1
    return value if value in range(1, 9) else 1


def upright_size(image: Opened, orientation: int | None = None) -> tuple[int, int]:
    """Return (width, height) with the EXIF orientation applied; pass `orientation` if it has been read."""
    orientation = read_orientation(image) if orientation is None else orientation
    return image.size[::-1] if orientation >= 5 else image.size


def measure_image(data: EncodedImage) -> tuple[int, int]:
    """Return the upright (width, height) of an encoded image, EXIF orientation applied; only the header is read.

    Raises:
        ValueError: see `open_image`.
    """
    return upright_size(open_image(data))


def is_jpeg(image: Opened) -> bool:
    """Return whether an opened image is a JPEG."""
    return image.format in ("JPEG", "MPO")  # MPO: several JPEGs in one file, as some phones write


def decode_pixels(
    image: Opened,
    data: EncodedImage,
    orientation: int | None = None,
    *,
    reduce: int = 1,
    repeat_colour: bool = False,
    room: np.ndarray | None = None,
) -> UInt8[Tensor, "3 h w"]:
    """Decode an image that `look_at` opened: upright, on white where transparent, the first frame of several.

    Args:
        image: from `look_at`.
        data: its file.
        orientation: from `read_orientation`, if that has been called.
        reduce: 1, or for a JPEG 2, 4 or 8: its size is divided by this, rounded up.
        repeat_colour: if a JPEG stores chroma at half the size, repeat each value for four pixels instead of
            interpolating; takes 6 % less time.
        room: bytes that may hold the result, if they suffice.

    Raises:
        ValueError: the file is broken.
    """
    orientation = read_orientation(image) if orientation is None else orientation
    width, height = image.size
    try:
        if is_jpeg(image) and reduce == 1 and image.mode in ("L", "RGB"):
            room = room if room is not None and room.size >= 3 * width * height else None
            pixels = decode_jpeg(data, room, repeat_colour=repeat_colour)
        else:
            if isinstance(image, PlainJpeg):
                image = open_image(data)
            if reduce > 1:
                image.draft(None, (width // reduce, height // reduce))
            pixels = rearrange(torch.from_numpy(np.array(to_rgb(image))), "h w c -> c h w")
    except BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"broken image: {reason}") from None
    if tuple(pixels.shape) != (3, -(-height // reduce), -(-width // reduce)):
        raise ValueError(f"broken image: {width} x {height} pixels in its header and others in its data")
    return turn(pixels, orientation)


def decode_jpeg(data: EncodedImage, room: np.ndarray | None, *, repeat_colour: bool) -> UInt8[Tensor, "3 h w"]:
    """Decode a whole JPEG as RGB, into `room` if given: allocating memory can cost half as much as decoding.

    Raises:
        RuntimeError: the file is broken.
    """
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, buffer=room, fastupsample=repeat_colour)).permute(2, 0, 1)
    except ValueError:  # simplejpeg is strict; torchvision accepts what other programs would show
        from torchvision.io import ImageReadMode  # takes seconds to import, which reading headers does not need
        from torchvision.io import decode_jpeg as decode

        # A bytearray, because torch warns about read-only memory.
        return decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 8 bits: the image would be white
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def turn(pixels: UInt8[Tensor, "3 a b"], orientation: int) -> UInt8[Tensor, "3 c d"]:
    """Apply an EXIF orientation, which makes the image upright (EXIF 2.32, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.mT
    flips = {2: [-1], 3: [-1, -2], 4: [-2], 6: [-1], 7: [-1, -2], 8: [-2]}.get(orientation)
    return pixels.flip(flips) if flips else pixels
