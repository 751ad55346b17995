"""Ways to decode an image to a peer's tensor; "best", "usual" and "ours" fit it into a 336-pixel square and pad."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

SIZE = 336
PADDING = (124, 116, 104)
FILL = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None].expand(3, SIZE, SIZE)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP


def decode_only(data: bytes) -> Tensor:
    """Decode with torchvision's libjpeg-turbo at full scale, the baseline; returns uint8 (3, h, w)."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def decode_reused(data: bytes, memory: list = []) -> Tensor:  # noqa: B006  shared by all calls in the process
    """Decode with simplejpeg's libjpeg-turbo into a reused buffer, the fastest way we know; returns uint8 (3, h, w)."""
    import numpy as np
    import simplejpeg

    if not memory:
        memory.append(np.empty(3 << 20, dtype=np.uint8))
    return torch.from_numpy(simplejpeg.decode_jpeg(data, buffer=memory[0])).permute(2, 0, 1)


def fit(width: int, height: int) -> tuple[int, int]:
    scale = SIZE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def best(data: bytes) -> Tensor:
    """Decode with torchvision's libjpeg-turbo, resize (bilinear, antialiased) on uint8; returns uint8 (3, 336, 336)."""
    image = decode_only(data)
    width, height = fit(image.shape[2], image.shape[1])
    image = F.resize_image(image, [height, width], antialias=True)
    if width == height:
        return image
    square, left, top = FILL.clone(), (SIZE - width) // 2, (SIZE - height) // 2
    square[:, top : top + height, left : left + width] = image
    return square


_normalise = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=MEAN, std=STD)])


def usual(data: bytes) -> Tensor:
    """Decode and resize (bilinear) with PIL, normalise; returns float32 (3, 336, 336)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = fit(*image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if width != height:
        square = Image.new("RGB", (SIZE, SIZE), PADDING)
        square.paste(image, ((SIZE - width) // 2, (SIZE - height) // 2))
        image = square
    return _normalise(image)


def ours(data: bytes) -> Tensor:
    """Apply fastvlm's transform, to separate decoder from loader speed; returns uint8 (3, 336, 336)."""
    from fastvlm.data.transforms import decode_image

    return decode_image(data, SIZE)


def collate(samples: list[tuple[Tensor, bytes]]) -> tuple[Tensor, list[bytes]]:
    """Collate with torch's default, which stacks a worker's batch directly in shared memory; texts stay a list."""
    tensors, texts = zip(*samples)
    return default_collate(list(tensors)), list(texts)


NAMED = {"decode_only": decode_only, "decode_reused": decode_reused, "best": best, "usual": usual, "ours": ours}
