"""ShareGPT text: a JSON list of conversations with the roles human, gpt, system, function_call and observation."""

from __future__ import annotations

from pathlib import Path

from data.recipes.conversations import convert, cut_conversations
from data.recipes.record import Part

__all__ = ["SPLITS", "convert", "parts"]
SPLITS = {"train": "train"}
HUB_FILES = ("ShareGPT_V3_unfiltered_cleaned_split.json",)  # in anon8231489123/ShareGPT_Vicuna_unfiltered


def parts(path: Path, *, split: str, rows: int = 5000) -> list[Part]:
    return cut_conversations(path, source="sharegpt", rows=rows, text=True)
