"""LLaVA-Instruct (mix665k, 150k) and the like: a JSON list of conversations about zero, one or several images."""

from __future__ import annotations

from pathlib import Path

from data.recipes.conversations import convert, cut_conversations
from data.recipes.record import Part

__all__ = ["SPLITS", "convert", "parts"]
SPLITS = {"train": "train"}
HUB_FILES = ("llava_v1_5_mix665k.json", "llava_instruct_150k.json")  # in liuhaotian/LLaVA-Instruct-150K


def parts(path: Path, *, split: str, images: tuple = (), rows: int = 2000) -> list[Part]:
    return cut_conversations(path, source="llava_instruct", rows=rows, images=images, files=HUB_FILES)
