"""FineVision: instruction sets as parquet with four ratings per turn (meta.ratings); some rows have no image."""

from __future__ import annotations

from pathlib import Path

from data.recipes.record import Part
from data.recipes.subsets import convert, cut_subsets

__all__ = ["SPLITS", "convert", "parts"]
SPLITS = {"train": "train"}
HUB = True


def parts(path: Path, *, split: str, name: tuple = (), streaming: bool = True, rows: int = 1000) -> list[Part]:
    return cut_subsets(path, source="finevision", split=split, name=name, streaming=streaming, rows=rows)
