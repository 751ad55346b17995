"""Our pipeline as in a training stage: plan, PlannedDataset, collate, MixtureDataModule's loader; without cache."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.peers.pixels import SIZE

PACKAGE = ""
TOKENS_PER_IMAGE, MAX_TOKENS = 64, 2048


def batches(folder: Path, *, pixels, workers: int, batch_size: int):
    from fastvlm.data.datamodule import MixtureDataModule
    from fastvlm.data.source import Mixture, Source
    from fastvlm.tokens import Tokenizer

    tokenizer = Tokenizer(str(folder / "tokenizer"), template="chatml")
    source = Source("photographs", path=folder / "shards")
    module = MixtureDataModule(
        Mixture({"photographs": source}, weights={"photographs": 1}, unit="samples"),
        tokenizer=tokenizer,
        image_size=SIZE,
        tokens_per_image=TOKENS_PER_IMAGE,
        batch_size=batch_size,
        max_tokens=MAX_TOKENS,
        packing=False,  # one image per row, so that a batch has as many images as a peer's
        num_workers=workers,
        val_samples=0,
        cache_bytes=0,
    )
    module.setup("fit")
    return module.train_dataloader()


def images(batch) -> torch.Tensor:
    return batch.pixel_values
