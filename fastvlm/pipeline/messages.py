"""What a run prints."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from omegaconf import DictConfig

from fastvlm.data.plan import Plan
from fastvlm.data.plan_report import notes
from fastvlm.hardware import Hardware, is_first_rank
from fastvlm.models.vlm import VLM


def say(message: str) -> None:
    """Print on the first rank only."""
    if is_first_rank():
        print(message, flush=True)


def quiet_lightning() -> None:
    """Silence Lightning's advice about workers and loggers, which this program decides itself."""
    # gcsfs, which Lightning imports if it is installed, logs about its experimental features.
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "gcsfs"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody writes into it
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)


def run_summary(config: DictConfig, model: VLM, hardware: Hardware, *, run_dir: Path) -> str:
    """Return four lines: the run directory, the parts and their parameters, the stages, the hardware."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts.items()}
    parts = ", ".join(f"{name} {type(model.parts[name]).__name__} {n / 1e6:.2f}M" for name, n in counts.items())
    return (
        f"run      {run_dir}\nmodel    {parts} = {sum(counts.values()) / 1e6:.2f}M parameters\n"
        f"stages   {' -> '.join(config.stages)}\n"
        f"hardware {hardware.num_ranks} x {hardware.accelerator}, {hardware.precision}, {hardware.threads} threads, "
        f"{hardware.num_workers} loader workers"
    )


def stage_summary(name: str, config: dict, plan: Plan, *, folders: dict[str, Path], resume: Path | None) -> str:
    """Return a stage's length, what learns, where its parts come from, and remarks on its data.

    Args:
        config: the stage's resolved configuration.
        folders: part -> the handoff it was loaded from; other parts are new.
        resume: the checkpoint to resume from; None: start at step 0.
    """
    loaded = ", ".join(f"{p} <- {Path(folders[p]).parent.name}" for p in config["parts"] if p in folders)
    new = ", ".join(p for p in config["parts"] if p not in folders)
    size = f", {config['image_size']} px" if plan.num_images else ""
    length = f"{plan.num_steps} steps x {config['batch_size']} rows{size}"
    lines = [
        f"\n{name}: {length}; learns {', '.join(learning(config))}",
        f"  loaded: {loaded or 'nothing'}; new: {new or 'nothing'}",
        *([f"  going on from {resume.name}"] if resume else []),
        *(f"  {line}" for line in notes(plan)),
    ]
    return "\n".join(lines)


def learning(stage: dict) -> list[str]:
    """Return what learns according to a stage's configuration: part, method and rate."""
    rates = {p: r["lr"] if isinstance(r, dict) else r for p, r in stage["trainable"].items()}
    out = [f"{part} {rate:g}" for part, rate in rates.items() if rate is not None]
    if lora := stage["lora"]:
        out.append(f"LoRA r={lora['r']} {lora['lr']:g}")
    if layers := stage["last_layers"]:
        out.append(f"last {layers['num']} layers {layers['lr']:g}")
    for part, adapt in stage["adapt"].items():
        if adapt["lr"] is None:
            continue
        how = {"lora": f"LoRA r={adapt['r']}", "dora": f"DoRA r={adapt['r']}", "partial": f"last {adapt['num']} layers"}
        held = f" over {adapt['quantise']}" if adapt["quantise"] else ""
        out.append(f"{part} {how.get(adapt['method'], '')}{held} {adapt['lr']:g}")
    return out
