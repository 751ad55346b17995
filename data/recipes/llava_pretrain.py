"""LLaVA-Pretrain: 558k captions (BLIP, LAION, CC, SBU) as one JSON list with an image and one question a row."""

from __future__ import annotations

from pathlib import Path

from data.recipes.conversations import convert, cut_conversations
from data.recipes.record import Part

__all__ = ["SPLITS", "convert", "parts"]
SPLITS = {"train": "train"}
HUB_FILES = ("blip_laion_cc_sbu_558k.json",)  # of liuhaotian/LLaVA-Pretrain


def parts(path: Path, *, split: str, images: tuple = (), form: str = "document", rows: int = 2000) -> list[Part]:
    """`form=document` leaves the question out, as LLaVA's first stage does (its conversation version "plain")."""
    settings = {"source": "llava_pretrain", "images": images, "files": HUB_FILES, "form": form}
    return cut_conversations(path, rows=rows, **settings)
