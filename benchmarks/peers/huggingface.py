"""Hugging Face datasets: an Arrow table in memory-mapped files, `set_transform`, torch's DataLoader."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader

from benchmarks import made
from benchmarks.peers.pixels import collate

PACKAGE = "datasets"


def convert(shards: Path, to: Path) -> None:
    from datasets import Dataset, Features, Image, Value

    def rows():
        for key, text, image in made.samples(shards):
            yield {"image": {"bytes": image, "path": f"{key}.jpg"}, "text": text}

    features = Features({"image": Image(decode=False), "text": Value("binary")})
    Dataset.from_generator(rows, features=features, cache_dir=str(to.parent / "hf_cache")).save_to_disk(str(to))


def batches(folder: Path, *, pixels, workers: int, batch_size: int):
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder))
    dataset.set_transform(
        lambda rows: {"image": [pixels(image["bytes"]) for image in rows["image"]], "text": rows["text"]}
    )
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers, collate_fn=stack)


def stack(rows: list[dict]):
    return collate([(row["image"], row["text"]) for row in rows])


def mix(folder: Path, *, weights: list[float], count: int, seed: int) -> list[int]:
    from datasets import Dataset, interleave_datasets

    # Mixing stops when a source is exhausted, so each is large enough never to be.
    sources = [Dataset.from_dict({"source": [i] * count}) for i in range(len(weights))]
    mixed = interleave_datasets(sources, probabilities=weights, seed=seed, stopping_strategy="first_exhausted")
    return mixed[:count]["source"]
