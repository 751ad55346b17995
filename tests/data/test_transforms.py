from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import draw_png
from torchvision.transforms.v2 import functional as reference

from fastvlm.data import decode
from fastvlm.data.transforms import PADDING, decode_image, decode_label_map


def encode(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


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


def test_scaled_jpeg_decoding_is_close_to_decoding_all_of_it():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((800, 800))
    data = encode(smooth, "jpeg", quality=95)
    theirs = reference.resize(pixels(data), [64, 64], antialias=True)
    assert (decode_image(data, 64).int() - theirs.int()).abs().max() <= 3


def test_transparent_images_lie_on_white_and_photographs_are_upright():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode_image(encode(clear), 4).eq(255).all()
    photo = Image.new("RGB", (8, 4), "black")
    photo.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    upright = decode_image(encode(photo, "jpeg", exif=exif, quality=100), 8)
    assert upright[:, 0, 4].min() > 250 and upright[:, 7, 4].max() < 5


def test_bombs_and_broken_files_are_value_errors(monkeypatch):
    data = draw_png(0, (32, 32))
    for broken in (b"", b"no image", data[: len(data) // 2], data[:60] + bytes(20) + data[80:]):
        with pytest.raises(ValueError, match="image"):
            decode_image(broken, 32)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="32 x 32 pixels"):
        decode_image(data, 32)


def test_label_maps_are_decoded_as_they_are():
    data = draw_png(5, (3, 2))
    assert torch.equal(decode_label_map(data), pixels(data))
