"""mosaicml-streaming with `batching_method="stratified"`: every batch of 200 has each source in proportion."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import mosaicml

PACKAGE = mosaicml.PACKAGE


def mix(folder: Path, *, weights: list[float], count: int, seed: int) -> list[int]:
    return mosaicml.mix(folder, weights=weights, count=count, seed=seed, batching="stratified")
