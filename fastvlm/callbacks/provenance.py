"""Record how a run was produced: commit, configuration, command, versions, machine, seeds."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

PACKAGES = (
    *("torch", "torchvision", "lightning", "transformers", "tokenizers", "open_clip_torch", "timm", "peft"),
    *("hydra-core", "omegaconf", "webdataset", "torchmetrics", "mlflow", "safetensors", "numpy", "pillow", "pyarrow"),
)


def read_git(folder: Path | None = None) -> dict[str, Any]:
    """Return the commit and whether tracked files differ from it; `commit` is None outside a repository."""
    folder = folder or Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed), "changed": (changed or "").splitlines()[:50]}


def read_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read_hardware() -> dict[str, Any]:
    """Return CPU, cores available to this process, memory and accelerators, without machine or user names."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "cores": usable,
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [],
    }
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        hardware["gpus"] = [f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in properties]
        hardware["cuda"] = torch.version.cuda
    return hardware


def read_provenance(
    *, config: Mapping[str, Any] | None = None, seeds: Mapping[str, int] | None = None, root: Path | None = None
) -> dict[str, Any]:
    """Return everything needed to run this again, as a dict for JSON."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git": read_git(root),
        "seeds": dict(seeds or {}),
        "versions": read_versions(),
        "hardware": read_hardware(),
        "config": dict(config or {}),
    }


class Provenance(Callback):
    """Writes `<stage>/provenance.json` when training starts, and tags the loggers' runs with it.

    A resumed stage keeps the records of earlier attempts under `earlier`, without their configurations.

    Args:
        path: file to write; None: `<trainer.default_root_dir>/provenance.json`.
        config: resolved configuration as plain dicts, logged as the MLflow run's parameters. If a resumed run differs
            from what is stored, the logger records the difference and does not raise.
        seeds: name -> seed.
        tags: additional tags of the MLflow run.
        root: folder whose git commit is recorded; None: that of this package.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        seeds: Mapping[str, int] | None = None,
        tags: Mapping[str, Any] | None = None,
        root: str | Path | None = None,
    ):
        self.config, self.seeds, self.tags = dict(config or {}), dict(seeds or {}), dict(tags or {})
        self.path, self.root = Path(path) if path else None, Path(root) if root else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        provenance = read_provenance(config=self.config, seeds=self.seeds, root=self.root)
        provenance |= {
            "stage": getattr(pl_module, "name", type(pl_module).__name__),
            "started_at_step": trainer.global_step,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "strategy": type(trainer.strategy).__name__,
        }
        path = self.path or Path(trainer.default_root_dir) / "provenance.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and trainer.global_step:
            try:
                before = json.loads(path.read_text())
            except json.JSONDecodeError:
                before = {}
            earlier = before.pop("earlier", [])
            before.pop("config", None)
            provenance["earlier"] = [*earlier, before] if before else earlier
        part = path.with_suffix(".part")
        part.write_text(json.dumps(provenance, indent=1, default=str))
        part.replace(path)

        git, hardware = provenance["git"], provenance["hardware"]
        tags = {
            "command": provenance["command"],
            "git.dirty": git["dirty"],
            "hardware": ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores",
            **{f"seed.{name}": seed for name, seed in self.seeds.items()},
            **{
                f"version.{name}": provenance["versions"].get(name, "?")
                for name in ("torch", "lightning", "transformers")
            },
            **self.tags,
        }
        if git["commit"]:
            tags["mlflow.source.git.commit"] = git["commit"]
        for logger in trainer.loggers:
            if self.config:
                logger.log_hyperparams(self.config)
            if hasattr(logger, "set_tags"):
                logger.set_tags(tags)
            if hasattr(logger, "log_file"):
                logger.log_file(path)
