"""litdata: optimized chunks, local."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks import made
from benchmarks.peers.pixels import collate

PACKAGE = "litdata"


def convert(shards: Path, to: Path) -> None:
    import litdata as ld

    listed = [(image, text) for _, text, image in made.samples(shards)]
    ld.optimize(fn=unchanged, inputs=listed, output_dir=str(to), chunk_bytes="64MB", num_workers=1, verbose=False)


def unchanged(sample):
    return sample


def batches(folder: Path, *, pixels, workers: int, batch_size: int):
    import litdata as ld

    dataset = ld.StreamingDataset(str(folder), shuffle=True, transform=partial(sample, pixels=pixels))
    return ld.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)


def sample(fields, *, pixels):
    return pixels(fields[0]), bytes(fields[1])  # copies a view of the chunk, which cannot go through a queue


def mix(folder: Path, *, weights: list[float], count: int, seed: int) -> list[int]:
    import litdata as ld

    datasets = []
    for i in range(len(weights)):
        to = folder / f"source{i}"
        if not to.exists():
            # Mixing stops when a source is exhausted, so each is large enough never to be.
            ld.optimize(
                fn=unchanged, inputs=[i] * count, output_dir=str(to), chunk_size=20000, num_workers=1, verbose=False
            )
        datasets.append(ld.StreamingDataset(str(to), shuffle=True))
    mixed = ld.CombinedStreamingDataset(datasets, weights=weights, seed=seed, iterate_over_all=False)
    return [int(i) for i in islice(mixed, count)]
