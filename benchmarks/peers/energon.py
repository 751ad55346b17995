"""megatron-energon: reads our shards with its own index; a MetadatasetV2 blend mixes sources."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from benchmarks.peers.pixels import collate

PACKAGE = "megatron-energon"


def convert(shards: Path, to: Path) -> None:
    to.mkdir(parents=True)
    for shard in shards.glob("*.tar"):
        os.link(shard, to / shard.name)
    prepare(to)


def prepare(folder: Path) -> None:
    from megatron.energon.flavors import CrudeWebdataset

    names = sorted(path.name for path in folder.glob("*.tar"))
    CrudeWebdataset.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
    lines = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(lines)


def encoder(cook):
    from megatron.energon import Cooker, DefaultTaskEncoder

    class Encoder(DefaultTaskEncoder):
        decoder = None  # keep bytes: `cook` decodes
        cookers = [Cooker(cook)]

        def batch(self, samples: list):
            return collate(samples)

    return Encoder()


def batches(folder: Path, *, pixels, workers: int, batch_size: int):
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset, stateless

    @stateless
    def cook(sample: dict):
        return pixels(sample["0.jpg"]), sample["json"]

    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=batch_size,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=encoder(cook),
    )
    return get_loader(dataset)


def mix(folder: Path, *, weights: list[float], count: int, seed: int) -> list[int]:
    import io
    import tarfile

    from megatron.energon import WorkerConfig, get_loader, get_train_dataset, stateless

    lines = ["__module__: megatron.energon", "__class__: MetadatasetV2", "splits:", "  train:", "    blend:"]
    for i, weight in enumerate(weights):
        path = folder / f"source{i}"
        if not path.exists():
            path.mkdir(parents=True)
            with tarfile.open(path / "train-00000.tar", "w") as tar:
                for k in range(2000):
                    info = tarfile.TarInfo(f"{k:05d}.txt")
                    info.size = len(str(i))
                    tar.addfile(info, io.BytesIO(str(i).encode()))
            prepare(path)
        lines += [f"      - path: source{i}", f"        weight: {weight!r}"]
    blend = folder / "blend.yaml"
    blend.write_text("\n".join(lines) + "\n")

    @stateless
    def cook(sample: dict):
        return int(sample["txt"])

    class Plain(type(encoder(cook))):
        cookers = encoder(cook).cookers

        def batch(self, samples: list):
            return samples

    dataset = get_train_dataset(
        blend,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=seed),
        batch_size=1000,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Plain(),
    )
    batches = islice(get_loader(dataset), -(-count // 1000))
    return [source for batch in batches for source in batch][:count]
