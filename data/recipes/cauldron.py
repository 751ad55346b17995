"""The Cauldron: fifty instruction sets as parquet, images before the first question."""

from __future__ import annotations

from pathlib import Path

from data.recipes.record import Part
from data.recipes.subsets import convert, cut_subsets

__all__ = ["SPLITS", "convert", "parts"]
SPLITS = {"train": "train"}
HUB = True


def parts(path: Path, *, split: str, name: tuple = (), streaming: bool = True, rows: int = 1000) -> list[Part]:
    return cut_subsets(path, source="cauldron", split=split, name=name, streaming=streaming, rows=rows)
