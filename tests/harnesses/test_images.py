"""What a harness has opened is read as the file it came from."""

import io

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import draw_pixels

from fastvlm.data.transforms import ImageTransform
from fastvlm.harnesses.images import to_bytes

PIXELS = draw_pixels(0)[:24]  # wider than high


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def held(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(PIXELS), "JPEG", exif=exif, quality=95)


FILES = {
    "transparent": saved(Image.fromarray(np.dstack([PIXELS, np.arange(24 * 32).reshape(24, 32) % 256]).astype("u1"))),
    "a palette with a transparent colour": saved(Image.fromarray(PIXELS).quantize(8), transparency=2),
    "16 bits": saved(Image.fromarray((np.arange(24 * 32).reshape(24, 32) * 80).astype(np.uint16))),
    "grey": saved(Image.fromarray(PIXELS[..., 0])),
    **{f"a camera held as {orientation}": held(orientation) for orientation in range(1, 9)},
}


@pytest.mark.parametrize("name", FILES)
def test_an_image_that_a_harness_opened_is_seen_as_its_file_is(name, tmp_path):
    file, read = FILES[name], ImageTransform(image_size=32)
    opened = read(to_bytes(Image.open(io.BytesIO(file)))).int()
    assert (opened - read(file).int()).abs().max() <= 2 * name.startswith("a camera")  # two decoders of JPEG
    (tmp_path / "x").write_bytes(file)
    assert to_bytes(str(tmp_path / "x")) == file
