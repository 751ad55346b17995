"""The images of plans, each sample once: which there are, their keys and their views, for loader processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvlm.data.features import image_key
from fastvlm.data.lengths import views_of
from fastvlm.data.plan import Plan
from fastvlm.data.shards import ShardReader
from fastvlm.data.transforms import ImageTransform
from fastvlm.data.validation import ValidationPlan

ROWS = 64  # samples a worker hashes at a time
Sample = tuple[int, int, list[int]]  # source number, row of its index, views of each image


def planned_samples(plan: Plan | ValidationPlan, transform: ImageTransform) -> list[Sample]:
    """Every sample of a plan that shows images, with the images that truncation leaves, in the shards' order."""
    shift = 40  # rows of one source stay far below 2**40
    steps = (
        np.fromiter((source << shift | row for pairs in plan.step(i).rows for source, row in pairs), np.int64)
        for i in range(plan.num_steps)
    )
    codes = np.unique(np.concatenate([np.empty(0, np.int64), *steps]))
    samples = []
    for code in codes.tolist():
        source, row = code >> shift, code & (1 << shift) - 1
        left, views = int(plan.sources[source].images[row]), []
        for count in views_of(plan.sources[source].index, row, transform) if left else ():
            if left <= 0:
                break
            views.append(count)
            left -= count
        if views:
            samples.append((source, row, views))
    return samples


def plan_key(plans: Sequence[Plan | ValidationPlan], samples: Sequence[Sequence[Sample]]) -> str:
    """Name of a set of images: the indexes' checksums and the rows."""
    digest = hashlib.sha256()
    for plan, chosen in zip(plans, samples):
        digest.update(json.dumps([s.index.checksum for s in plan.sources]).encode())
        digest.update(json.dumps(chosen).encode())
    return digest.hexdigest()[:32]


class ImageKeys(Dataset):
    """Item i: [(sample number, image number, key), ...] of some samples. What cannot be read is left to training, which
    skips it, counts it and says why."""

    def __init__(self, plans: list, samples: list[tuple[int, int, int, list[int]]]):
        self.plans, self.samples, self.reader = plans, samples, ShardReader()

    def __len__(self) -> int:
        return -(-len(self.samples) // ROWS)

    def __getitem__(self, i: int) -> list[tuple[int, int, bytes]]:
        found = []
        for number in range(i * ROWS, min((i + 1) * ROWS, len(self.samples))):
            plan, source, row, views = self.samples[number]
            with contextlib.suppress(OSError, ValueError):
                raw = self.plans[plan].sources[source].index.read(row, self.reader)
                found += [(number, k, image_key(data)) for k, data in enumerate(raw.images[: len(views)])]
        return found


class ImageViews(Dataset):
    """Item i: keys, numbers of views and views (V, 3, H, W) of a batch of images; and how many could not be decoded."""

    def __init__(self, plans: list, jobs: list[tuple[int, int, int, int]], transform: ImageTransform, batch_size: int):
        self.plans, self.jobs, self.transform, self.batch_size = plans, jobs, transform, batch_size
        self.reader = ShardReader()

    def __len__(self) -> int:
        return -(-len(self.jobs) // self.batch_size)

    def __getitem__(self, i: int) -> tuple[list[bytes], list[int], Tensor | None, int]:
        keys, counts, views = [], [], []
        jobs = self.jobs[i * self.batch_size : (i + 1) * self.batch_size]
        for plan, source, row, k in jobs:
            with contextlib.suppress(OSError, ValueError):
                data = self.plans[plan].sources[source].index.read(row, self.reader).images[k]
                seen = self.transform(data)
                # The key of these very bytes, and not of what an earlier pass has read here.
                keys.append(image_key(data))
                counts.append(len(seen))
                views.append(seen)
        return keys, counts, torch.cat(views) if views else None, len(jobs) - len(keys)
