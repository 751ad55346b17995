"""Estimate each stage's memory on a device before a run; if it does not fit, name the keys that reduce it."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, OmegaConf

from fastvlm.build import instantiate
from fastvlm.hardware import Hardware
from fastvlm.models.memory import GIB, Memory, estimate
from fastvlm.models.vlm import VLM
from fastvlm.pipeline.learned import build_freezing, what_learns
from fastvlm.pipeline.stage_data import slots_of

SMALL = 5e7  # parameters; smaller models are left out unless `hardware.memory_gib` is given
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def memory_notes(config: DictConfig, model: VLM, hardware: Hardware, *, known: bool = True) -> list[str]:
    """Return one line per stage, and a second one for a stage that will not fit; nothing for small models.

    Args:
        known: whether the device's memory is known.
    """
    if hardware.memory_gib is None and sum(p.numel() for p in model.parameters()) < SMALL:
        return []
    lines, has = [], hardware.memory if known else math.inf
    for name, stage in config.stages.items():
        try:
            need = stage_memory(name, stage, model, hardware)
        except Exception as error:  # noqa: BLE001  a model may do anything that fails without values
            lines.append(f"memory   {name}: not known before it runs ({type(error).__name__} without numbers)")
            continue
        lines.append(f"memory   {name}: {need} of {f'{has / GIB:.2f}' if known else 'what hardware.memory_gib says'}")
        if need.total > has:
            learns = any(n.startswith("llm.") and ".lora_" not in n for n in what_learns(name, stage, model))
            mend = "; ".join(keys_that_mend(name, stage, hardware, largest=need.largest, llm_learns=learns))
            lines.append(f"         {name} will not fit, {need.largest} being most of it: {mend}")
    if hardware.shards and known:
        # Every rank holds the model and a copy of it until the copy is shared out; this process has one already.
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        need, free = (2 * hardware.devices - 1) * size, psutil.virtual_memory().available
        if need > free:
            lines.append(
                f"memory   of this machine: {hardware.devices} ranks need {need / GIB:.0f} GiB before they share the "
                f"weights, and {free / GIB:.0f} are free: lower hardware.devices, or llm.dtype=bfloat16 if it is frozen"
            )
    return lines


def planned_hardware(options: DictConfig) -> tuple[Hardware, bool]:
    """Return the hardware a configuration names, even if this machine lacks it, and whether its memory is known."""
    plain = OmegaConf.to_container(options, resolve=True)
    needs = plain.get("devices", "auto")
    needs = 1 if needs == "auto" else int(needs)
    elsewhere = plain.get("accelerator", "auto") == "gpu" and torch.cuda.device_count() < needs
    if elsewhere:
        plain["accelerator"] = "cpu"
        if plain.get("precision", "auto") == "auto":
            plain["precision"] = "bf16-mixed"
    if plain.get("strategy") == "deepspeed_zero3":  # shards as FSDP2 does; may not be installed here
        plain["strategy"] = "fsdp"
    known = not elsewhere or plain.get("memory_gib") is not None
    return instantiate(OmegaConf.create(plain), key="hardware"), known


def stage_memory(name: str, stage: DictConfig, model: VLM, hardware: Hardware) -> Memory:
    """Estimate one stage with full rows and as many images as they have room for."""
    plain = OmegaConf.to_container(stage, resolve=True)
    freezing = build_freezing(name, plain, quantise=hardware.quantise, path=Path("unused"))
    rows = rows_at_once(stage, hardware)
    images = 0
    if "encoder" in stage.parts:
        room = stage.max_tokens // slots_of(stage, model) if "llm" in stage.parts else 1
        images = rows * min(stage.max_images, max(1, room))
    return estimate(
        model,
        apply=lambda model: {n: one["lr"] for n, one in freezing.adapted(model).items()},
        quantised=freezing.quantised,
        optimizer=instantiate(stage.optimizer, key=f"stages.{name}.optimizer"),
        rows=rows,
        tokens=stage.max_tokens,
        images=images,
        image_size=stage.image_size,
        parts=stage.parts,
        autocast=AUTOCAST.get(hardware.precision),
        shards=hardware.num_ranks if hardware.shards else 1,
    )


def rows_at_once(stage: DictConfig, hardware: Hardware) -> int:
    """Return the rows of one micro-batch on one device."""
    return max(1, stage.batch_size // hardware.num_ranks // hardware.micro_batches(stage.batch_size))


def keys_that_mend(name: str, stage: DictConfig, hardware: Hardware, *, largest: str, llm_learns: bool) -> list[str]:
    """Return keys that reduce a stage's largest share of memory, the cheapest first.

    Args:
        llm_learns: whether the stage trains the language model's own weights, which then need 32 bits.
    """
    here, keys, eight_bits = f"stages.{name}", [], "8bit" in str(stage.optimizer)
    adapters = f"{here}.adapt.llm='{{method: lora, lr: 1e-4}}' in place of training it whole"
    # bitsandbytes' optimisers step no shards.
    shard = [] if hardware.shards or hardware.num_ranks == 1 or eight_bits else ["hardware.strategy=fsdp"]
    if largest in ("activations", "logits"):
        rows = rows_at_once(stage, hardware)
        if rows > 1:
            keys.append(f"hardware.rows_per_device={rows // 2}")
        if not hardware.gradient_checkpointing and largest == "activations":
            keys.append("hardware.gradient_checkpointing=true")
        return [*keys, f"{here}.max_tokens={stage.max_tokens // 2}"]
    if largest == "weights" and llm_learns:
        return [adapters, *shard]
    if largest == "weights":
        if not hardware.quantise:
            keys.append("hardware.quantise=int8 (or nf4)")
        return [*keys, *shard, "llm.dtype=bfloat16 for pretrained weights"]
    keys.append(adapters)
    if largest == "optimiser" and not (eight_bits or shard or hardware.shards):
        keys.append(f"optimizer@{here}.optimizer=adamw8bit")
    return [*keys, *shard]
