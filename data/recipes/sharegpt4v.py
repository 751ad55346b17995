"""ShareGPT4V: captions and instructions in LLaVA's layout over several image sets (coco/, sam/, llava/, ...)."""

from __future__ import annotations

from pathlib import Path

from data.recipes.conversations import convert, cut_conversations
from data.recipes.record import Part

__all__ = ["SPLITS", "convert", "parts"]
SPLITS = {"train": "train"}
HUB_FILES = (  # in Lin-Chen/ShareGPT4V
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
    "sharegpt4v_instruct_gpt4-vision_cap100k.json",
    "share-captioner_coco_lcs_sam_1246k_1107.json",
)


def parts(path: Path, *, split: str, images: tuple = (), form: str = "messages", rows: int = 2000) -> list[Part]:
    """Return the parts of a split; `images=coco=/data/coco,sam=/nas/sam,/data/rest` gives a folder per name prefix."""
    return cut_conversations(path, source="sharegpt4v", rows=rows, images=images, files=HUB_FILES, form=form)
