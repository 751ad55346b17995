"""What a strategy that shares the weights among ranks cannot do, refused before it tries."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig


def check_resumed(checkpoint: Path, *, strategy: str) -> None:
    """Check that a checkpoint's optimiser state is numbered as this run's strategy numbers it.

    Under FSDP2 Lightning numbers it by the model's parameters, otherwise by the optimiser's; DeepSpeed writes folders.

    Raises:
        ValueError: it is not.
    """
    wrote, now = "deepspeed_zero3", strategy if strategy in ("fsdp", "deepspeed_zero3") else "auto"
    if not checkpoint.is_dir():
        wrote = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False).get("strategy", "auto")
    if wrote != now:
        raise ValueError(
            f"{checkpoint} holds the optimiser's state as hardware.strategy={wrote} keeps it; go on with that, or "
            f"delete {checkpoint.parent} to train the stage anew with hardware.strategy={strategy}"
        )


def check_fsdp(name: str, stage: DictConfig) -> None:
    """Check that a stage's optimiser steps FSDP2's shards.

    Raises:
        ValueError: it does not.
    """
    if stage.optimizer.get("_target_", "").endswith(".adamw_8bit"):
        raise ValueError(
            f"stages.{name}.optimizer: bitsandbytes' adamw_8bit steps no shards of hardware.strategy=fsdp; set "
            f"optimizer@stages.{name}.optimizer=adamw"
        )


def check_deepspeed(name: str, stage: DictConfig, *, quantise: str | None, longest_first: bool) -> None:
    """Check that a stage's settings work with DeepSpeed's flat shards.

    Raises:
        ValueError: one of them does not.
    """
    here, instead = f"stages.{name}", "or share the weights by hardware.strategy=fsdp"
    kind = stage.optimizer.get("_target_", "").rsplit(".", 1)[-1]
    if kind in ("MuonAdamW", "Adafactor"):
        raise ValueError(
            f"{here}.optimizer: {kind} needs whole matrices, and hardware.strategy=deepspeed_zero3 hands out flat "
            f"pieces of them; set optimizer@{here}.optimizer=adamw, {instead}"
        )
    held = [f"{here}.adapt.{part}.quantise" for part, one in stage.adapt.items() if one.quantise]
    if held or quantise:
        raise ValueError(
            f"{(held or ['hardware.quantise'])[0]}: hardware.strategy=deepspeed_zero3 cannot cut weights held in "
            f"few bits; set it to null, {instead}"
        )
    if longest_first:
        raise ValueError(
            f"data.longest_first=true: hardware.strategy=deepspeed_zero3 cannot try a step; set it false, {instead}"
        )
