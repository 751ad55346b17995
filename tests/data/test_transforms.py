from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from tiny_world import draw_png
from torchvision.transforms.v2 import functional as reference

from fastvlm.data import decode
from fastvlm.data.decode import PlainJpeg, decode_pixels, look_at, measure_image, open_image, upright_size
from fastvlm.data.transforms import PADDING, ImageTransform, decode_image, decode_label_map

ROOT = Path(__file__).parents[2]
PHOTOS = [Image.fromarray(array) for array in load_sample_images().images]  # 640 x 427


def encode(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def padded_by_pillow(data, size):
    """The same picture by Pillow alone: all of it decoded, its resize, its paste."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    scale = size / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    square = Image.new("RGB", (size, size), PADDING)
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def test_a_square_image_of_the_right_size_is_left_alone():
    data = draw_png(0, (32, 32))
    assert torch.equal(decode_image(data, 32), pixels(data))


def test_resizing_is_bilinear_with_antialiasing():
    data = draw_png(0, (96, 96))
    theirs = reference.resize(pixels(data), [32, 32], antialias=True)
    assert (decode_image(data, 32).int() - theirs.int()).abs().max() <= 1


def test_the_aspect_is_kept_and_the_rest_padded():
    image = decode_image(draw_png(0, (64, 32)), 32)
    assert image.shape == (3, 32, 32)
    padding = torch.tensor(PADDING, dtype=torch.uint8)
    for row in (*range(8), *range(24, 32)):
        assert torch.equal(image[:, row], padding[:, None].expand(3, 32))
    whole = reference.resize(pixels(draw_png(0, (64, 32))), [16, 32], antialias=True)
    assert (image[:, 8:24].int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (500, 400), (90, 60)])
@pytest.mark.parametrize(
    ("kind", "options"), [("jpeg", {"subsampling": 0}), ("jpeg", {"subsampling": 0, "progressive": True}), ("png", {})]
)
def test_photographs_equal_pillows_to_one_level(size, kind, options):
    for photo in PHOTOS:
        data = encode(photo.resize(size), kind, **options)
        off = (decode_image(data, 224).int() - padded_by_pillow(data, 224).int()).abs()
        assert off.max() <= 1 and off.float().mean() < 0.02


@pytest.mark.parametrize("side", [600, 448])
def test_a_jpeg_that_is_hardly_made_smaller_equals_pillows_to_one_level(side):
    for photo in PHOTOS:
        data = encode(photo, "jpeg", quality=85)
        off = (decode_image(data, side).int() - padded_by_pillow(data, side).int()).abs()
        assert off.max() <= 1 and off.float().mean() < 0.02


@pytest.mark.parametrize("quality", [75, 85, 95])
@pytest.mark.parametrize("side", [420, 336, 256])
def test_repeated_colour_is_as_near_the_picture_before_compression_as_interpolated(side, quality):
    for photo in PHOTOS:
        data, best = encode(photo, "jpeg", quality=quality), padded_by_pillow(encode(photo), side).double()
        ours, usual = decode_image(data, side).double(), padded_by_pillow(data, side).double()
        off = (ours - usual).abs()
        assert off.max() > 1 and off.mean() < 0.5  # else nothing was repeated
        assert (ours - best).square().mean().sqrt() < 1.03 * (usual - best).square().mean().sqrt()


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_reduced_decode_stays_close_to_decoding_all_of_it(factor):
    side = 32
    odd = (factor * 2 * side + 5, factor * 2 * side + 3)  # the last pixel lies partly beyond the image
    even = (factor * 2 * side + 16, factor * 2 * side)
    for photo, orientation, size in zip((*PHOTOS, *PHOTOS), (1, 6, 1, 6), (odd, odd, even, even)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(photo.resize(size), "jpeg", quality=95, exif=exif)
        off = (decode_image(data, side).int() - padded_by_pillow(data, side).int()).abs()
        assert off.max() <= 24 and off.float().mean() < 1


def test_a_reduced_decode_reads_less(monkeypatch):
    """A photograph of twelve megapixels for a small view: a sixteenth of it at most is ever made."""
    data = encode(PHOTOS[0].resize((4000, 3000)), "jpeg")
    assert decode_pixels(open_image(data), data, reduce=4).shape == (3, 750, 1000)
    made = []
    monkeypatch.setattr(
        "fastvlm.data.transforms.decode_pixels",
        lambda *given, reduce, **options: made.append(reduce) or decode_pixels(*given, reduce=reduce, **options),
    )
    decode_image(data, 336)
    decode_image(encode(PHOTOS[0], "jpeg"), 336)
    assert made == [4, 1]


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    side=st.integers(1, 40),
    fit=st.sampled_from(("pad", "crop", "squash")),
    kind=st.sampled_from(("jpeg", "png", "webp")),
)
def test_any_size_becomes_a_square(width, height, side, fit, kind):
    data = encode(Image.new("RGB", (width, height), (200, 100, 50)), kind)
    views = ImageTransform(image_size=side, fit=fit, padding=(200, 100, 50))(data)
    assert views.shape == (1, 3, side, side)
    colour = torch.tensor([200, 100, 50])[:, None, None]
    assert (views[0].int() - colour).abs().max() <= 4, "one colour stays one colour, whatever is cut or padded"


def test_fits_equal_torchvisions():
    data = encode(PHOTOS[0])
    squashed = reference.resize(pixels(data), [48, 48], antialias=True)
    assert torch.equal(ImageTransform(image_size=48, fit="squash")(data)[0], squashed)
    data = encode(PHOTOS[0].resize((640, 400)))
    cropped = reference.center_crop(reference.resize(pixels(data), [50], antialias=True), [50, 50])
    off = (ImageTransform(image_size=50, fit="crop")(data)[0].int() - cropped.int()).abs()
    assert off[:, :, 1:-1].max() <= 1, "only the first and the last column see what lies beyond the crop"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_photographs_are_upright_and_their_size_is_that_of_the_upright_picture(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTOS[0].resize((64, 40)), kind, exif=exif, **({} if kind == "png" else {"quality": 100}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert measure_image(data) == upright.size
    ours = decode_pixels(open_image(data), data)
    assert torch.equal(ours, torch.from_numpy(np.array(upright)).permute(2, 0, 1))


@pytest.mark.parametrize("block", [b"nonsense", b"", b"II", b"II*\0", b"II+\0\x08\0\0\0", b"MM\0*\0\0\0\x08\0\1"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_an_orientation_that_is_nonsense_is_none(kind, block):
    density = {"dpi": (72, 72)} if kind == "jpeg" else {}  # without it, Pillow reads the EXIF when it opens the file
    data = encode(PHOTOS[0].resize((64, 40)), kind, exif=b"Exif\0\0" + block, **density)
    assert measure_image(data) == (64, 40) and decode_image(data, 32).shape == (3, 32, 32)


def test_transparent_images_lie_on_white():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    for kind in ("png", "webp"):
        assert decode_image(encode(clear, kind, lossless=True), 4).eq(255).all()
    half = Image.new("LA", (4, 4), (0, 128))
    assert decode_image(encode(half), 4).eq(127).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert decode_image(encode(palette), 4)[:, 0, 0].tolist() == [200, 0, 0]
    assert decode_image(encode(palette, transparency=1), 4).eq(255).all()
    assert decode_image(encode(palette, "gif", transparency=1), 4).eq(255).all()


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    data = encode(Image.fromarray(ramp))
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    assert decode_image(data, 16)[0].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_equals_pillows_conversion(mode):
    for kind in ("jpeg",) if mode in ("CMYK", "YCbCr") else ("png", "gif", "jpeg"):
        image = PHOTOS[0].resize((32, 24)).convert(mode)
        data = encode(image.convert("L") if mode in "1P" and kind == "jpeg" else image, kind)
        assert torch.equal(decode_pixels(look_at(data), data), pixels(data)), kind


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True, "quality": 60},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "profile": {"icc_profile": b"colours" * 20_000},
    "comment": {"comment": b"\xff\xd9\xff\xe1"},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_needs_no_pillow_and_has_the_pixels_of_torchvision(options, mode, monkeypatch):
    from torchvision.io import decode_jpeg

    room = np.empty(3 * 77 * 51, dtype=np.uint8)
    for size in ((77, 51), (16, 40), (1, 1)):
        data = encode(PHOTOS[0].resize(size).convert(mode), "jpeg", **options)
        image, theirs = look_at(data), open_image(data)
        assert isinstance(image, PlainJpeg) and (image.size, image.mode) == (theirs.size, theirs.mode) == (size, mode)
        whole = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB")
        with monkeypatch.context() as patch:
            patch.setattr("torchvision.io.decode_jpeg", lambda *a, **k: pytest.fail("the fast decoder refused it"))
            assert torch.equal(decode_pixels(image, data, room=room), whole)
            assert torch.equal(decode_pixels(image, data), whole)


def test_what_pillow_must_look_at_is_left_to_it():
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = PHOTOS[0].resize((64, 40))
    turned = encode(photo, "jpeg", exif=exif)
    several = encode(photo, "mpo", save_all=True, append_images=[photo])
    for data in (turned, several, encode(photo.convert("CMYK"), "jpeg"), encode(photo, "png"), encode(photo, "webp")):
        assert isinstance(look_at(data), Image.Image)
    assert upright_size(look_at(turned)) == (40, 64)


def test_what_the_fast_decoder_refuses_torchvision_decides(monkeypatch):
    data = encode(PHOTOS[0].resize((64, 40)), "jpeg")
    sound = decode_image(data, 48)

    def refuse(*args, **options):
        raise ValueError("a warning that others let pass")

    monkeypatch.setattr("simplejpeg.decode_jpeg", refuse)
    assert torch.equal(decode_image(data, 48), sound)
    with pytest.raises(ValueError, match="broken image"):
        decode_image(data[: len(data) // 2], 32)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({} if kind == "gif" else {"lossless": 1})
    )
    assert decode_image(data, 8)[:, 4, 4].tolist() == [255, 0, 0]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(kind):
    """A file of a few hundred bytes whose header promises 50,000 x 50,000 pixels."""
    if kind == "png":
        header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        body = chunk(b"IDAT", zlib.compress(bytes(10_000)))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")
    small = bytearray(encode(Image.new("RGB", (8, 8)), kind))
    if kind == "jpeg":
        at = small.index(b"\xff\xc0") + 5
        small[at : at + 4] = struct.pack(">HH", 50_000, 50_000)
    elif kind == "gif":
        small[6:10] = struct.pack("<HH", 50_000, 50_000)
    elif kind == "bmp":
        small[18:26] = struct.pack("<ii", 50_000, 50_000)
    return bytes(small)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp"])
def test_a_bomb_is_refused_by_its_header(kind, monkeypatch):
    data = bomb(kind)
    for decoder in ("torchvision.io.decode_jpeg", "simplejpeg.decode_jpeg"):
        monkeypatch.setattr(decoder, lambda *a, **k: pytest.fail("it was decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda *a: pytest.fail("it was decoded"))
    for read in (lambda data: decode_image(data, 32), measure_image, decode_label_map):
        with pytest.raises(ValueError, match="50000 x 50000 pixels, more than|decompression bomb"):
            read(data)


def test_a_file_that_is_too_long_is_refused_before_it_is_looked_at(monkeypatch):
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="bytes, more than 100"):
        decode_image(draw_png(0, (32, 32)), 32)


def test_broken_files_are_value_errors():
    for kind in ("png", "jpeg", "webp", "gif"):
        data = encode(PHOTOS[0].resize((96, 64)), kind)
        for broken in (b"", b"no image", data[: len(data) // 2], data[:20]):
            with pytest.raises(ValueError, match="image") as error:
                decode_image(broken, 32)
            assert " at 0x" not in str(error.value), "the same file is refused in the same words"
    with pytest.raises(ValueError, match="not an image"):
        decode_image(encode(Image.new("RGB", (4, 4)), "eps"), 32)  # Ghostscript is not for strangers' files


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(("jpeg", "png", "webp", "gif")))
def test_bytes_that_are_wrong_make_an_image_or_a_value_error(data, kind):
    whole = bytearray(encode(PHOTOS[0].resize((40, 30)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(whole), 16).shape == (3, 16, 16)
    except ValueError as error:
        assert "\n" not in str(error)


PROBE = """
import hashlib, io, sys
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from fastvlm.data.augment import Augmentation
from fastvlm.data.transforms import ImageTransform
digest = hashlib.sha256()
augment = Augmentation(crop=(0.5, 1), jitter=0.4, mirror=True)
for size in ((640, 427), (333, 250)):
    for kind in ("jpeg", "png"):
        file = io.BytesIO()
        Image.fromarray(load_sample_images().images[0]).resize(size).save(file, kind)
        for fit in ("pad", "crop"):
            transform = ImageTransform(image_size=64, fit=fit, tiles=[[1, 2], [2, 2]], augment=augment)
            for seed in (None, "7/a"):
                digest.update(np.ascontiguousarray(transform(file.getvalue(), seed=seed).numpy()).tobytes())
print(digest.hexdigest())
"""


def test_pixels_are_the_same_whatever_the_processor_can_do():
    seen = set()
    for capability in ("default", None):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True)
        seen.add(done.stdout.strip())
    assert len(seen) == 1 and len(seen.pop()) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fit": "squish"}, "image.fit=squish is not one of pad, crop, squash; did you mean squash?"),
        ({"image_size": 0}, "image_size=0"),
        ({"padding": (0, 0, 256)}, "image.padding"),
        ({"tiles": []}, "image.tiles is empty"),
        ({"tiles": [[1, 2], [0, 1]]}, r"image.tiles: \[0, 1\] is not a pair"),
        ({"tiles": [[1, 2, 3]]}, r"image.tiles: \[1, 2, 3\] is not a pair"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(**({"image_size": 32} | arguments))


def test_label_maps_are_decoded_as_they_are():
    data = draw_png(5, (3, 2))
    assert torch.equal(decode_label_map(data), pixels(data))
