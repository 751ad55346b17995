"""webdataset: reads our shards unchanged."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from benchmarks.peers.pixels import collate

PACKAGE = "webdataset"


def convert(shards: Path, to: Path) -> None:
    to.mkdir(parents=True)
    for shard in shards.glob("*.tar"):
        os.symlink(shard.resolve(), to / shard.name)


def batches(folder: Path, *, pixels, workers: int, batch_size: int):
    import webdataset as wds

    def sample(fields: dict):
        return pixels(fields["0.jpg"]), fields["json"]

    dataset = (
        wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=100, seed=0)
        .shuffle(100)
        .map(sample)
        .batched(batch_size, collation_fn=collate)
    )
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers)


def mix(folder: Path, *, weights: list[float], count: int, seed: int) -> list[int]:
    import random

    import webdataset as wds

    random.seed(seed)
    # RandomMix draws from the global generator and takes any iterable, so reading does not affect the order.
    mixed = wds.RandomMix([Constant(i) for i in range(len(weights))], probs=weights)
    return list(islice(mixed, count))


class Constant:
    def __init__(self, value: int):
        self.value = value

    def __iter__(self):
        while True:
            yield self.value
