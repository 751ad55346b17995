"""mosaicml-streaming: MDS shards, local."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader

from benchmarks import made
from benchmarks.peers.pixels import collate

PACKAGE = "mosaicml-streaming"


def convert(shards: Path, to: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(to), columns={"image": "bytes", "text": "bytes"}) as out:
        for _, text, image in made.samples(shards):
            out.write({"image": image, "text": text})


def batches(folder: Path, *, pixels, workers: int, batch_size: int):
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Photographs(StreamingDataset):
        def __getitem__(self, index: int):
            fields = super().__getitem__(index)
            return pixels(fields["image"]), fields["text"]

    dataset = Photographs(local=str(folder), shuffle=True, batch_size=batch_size)
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)


def mix(folder: Path, *, weights: list[float], count: int, seed: int, batching: str = "random") -> list[int]:
    from streaming import MDSWriter, Stream, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    streams = []
    for i, weight in enumerate(weights):
        local = folder / f"source{i}"
        if not local.exists():
            with MDSWriter(out=str(local), columns={"source": "int"}) as out:
                for _ in range(2000):
                    out.write({"source": i})
        streams.append(Stream(local=str(local), proportion=weight))
    dataset = StreamingDataset(
        streams=streams,
        epoch_size=count,
        shuffle=True,
        shuffle_seed=seed,
        batch_size=200,
        batching_method=batching,
        num_canonical_nodes=1,
    )
    return [sample["source"] for sample in dataset][:count]
