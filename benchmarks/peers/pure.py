"""The baseline: only decodes every image once by libjpeg-turbo, from memory, in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import made

PACKAGE = ""


def batches(folder: Path, *, pixels, workers: int, batch_size: int):
    files = [image for _, _, image in made.samples(folder)]
    for start in range(0, len(files), batch_size):
        for data in files[start : start + batch_size]:
            pixels(data)  # dropped at once: keeping a batch of full-size images would allocate new memory for each
        yield len(files[start : start + batch_size])


def images(batch: int) -> torch.Tensor:
    return torch.empty(batch, 3, 0, 0, dtype=torch.uint8)
