"""LLaVA-Pretrain: 558k captions (BLIP, LAION, CC, SBU) as one JSON list with an image and one question per row."""

from __future__ import annotations

from pathlib import Path

from data.recipes.conversations import convert, cut_conversations
from data.recipes.record import Part

__all__ = ["SPLITS", "convert", "parts"]
SPLITS = {"train": "train"}
HUB_FILES = ("blip_laion_cc_sbu_558k.json",)  # in liuhaotian/LLaVA-Pretrain


def parts(path: Path, *, split: str, images: tuple = (), form: str = "document", rows: int = 2000) -> list[Part]:
    """Return the parts of a split; `form=document` omits the question like LLaVA's first stage (version "plain")."""
    settings = {"source": "llava_pretrain", "images": images, "files": HUB_FILES, "form": form}
    return cut_conversations(path, rows=rows, **settings)
