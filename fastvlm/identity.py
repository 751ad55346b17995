"""Identity of a run: its configuration, the code that determines its results, its commit. Cheap to import."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastvlm.files import write_whole
from fastvlm.foundation import bare_code, own_code

ROOT = Path(__file__).resolve().parent.parent

# Keys for where, how fast and under which name something runs: never part of the identity of a stage or run.
INCIDENTAL = (
    "name",
    "paths",
    "hardware",
    "logger",
    "overwrite",
    "log_every",
    "checkpoint_every",
    "num_samples",
    "speed_images",
    "image_size",
    "data",
    "study",
    "arm",
    "scale",
    "dry_run",
    "objective",
)
# The code that determines trained weights. Precision, which hardware.py chooses, stands in a stage's identity by value.
CODE = ("tokens.py", "batch.py", "build.py", "models", "data", "stages")
CODE += ("callbacks/freezing.py", "callbacks/features.py", "callbacks/handoff.py")
CODE += ("pipeline/stage_data.py", "pipeline/training.py")
# The code that determines results: training, scoring, and the choice of precision, threads and micro-batches.
SCORING = (*CODE, "evaluation", "inference", "pipeline", "callbacks", "hardware.py")
# The libraries whose versions a result's numbers depend on most.
LIBRARIES = ("torch", "transformers")


@cache
def code_hash(code: tuple[str, ...] = CODE) -> str:
    """Return the hash of the source code that determines what a stage learns, or of other files; see `bare_code`."""
    package = ROOT / "fastvlm"
    files = sorted(
        {f for entry in code for f in ([package / entry] if entry.endswith(".py") else (package / entry).rglob("*.py"))}
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(package).as_posix()}\0{bare_code(file)}".encode())
    return digest.hexdigest()[:16]


def run_code(resolved: dict) -> str:
    """Return the hash of the code that determines a run's results, the user's own modules included."""
    own = own_code(identity(resolved))
    return hash_of([code_hash(SCORING), own]) if own else code_hash(SCORING)


# Pages and results that a study writes while the next one runs do not make the code dirty.
WRITTEN = [f":(exclude,glob)experiments/**/{name}" for name in ("README.md", "results.csv", "grid.json", "*.svg")]


@cache
def commit() -> str:
    """Return the commit of this checkout, with `-dirty` if files differ from it; `unknown` outside git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=all", "--", ".", *WRITTEN],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if dirty else "")


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity(resolved: dict) -> dict:
    """Return the part of a resolved configuration that determines a run's results."""
    return {key: value for key, value in resolved.items() if key not in INCIDENTAL}


def portable_hash(resolved: dict) -> str:
    """Hash a run's identity with the folders of `paths` replaced by names, so that it is the same on every machine."""
    return hash_of(named_folders(identity(resolved), resolved["paths"]))


def named_folders(value: Any, paths: dict[str, str]) -> Any:
    """Return a plain value in which the folders of `paths`, a run's own, are replaced by their names."""
    return replace_folders(value, {folder: f"<{name}>" for name, folder in paths.items()})


def replace_folders(value: Any, others: dict[str, str]) -> Any:
    """Return a plain value in which the strings that are a folder, or lie below it, begin with another.

    Args:
        others: folder -> what takes its place; of folders inside each other the innermost counts.
    """
    if isinstance(value, dict):
        return {key: replace_folders(inner, others) for key, inner in value.items()}
    if isinstance(value, list):
        return [replace_folders(inner, others) for inner in value]
    if isinstance(value, str):
        for folder in sorted(others, key=len, reverse=True):
            if value == folder or value.startswith(f"{folder}/"):
                return f"{others[folder]}{value[len(folder) :]}"
    return value


@cache
def libraries() -> dict[str, str]:
    """Return the installed versions of `LIBRARIES`, without importing them."""
    return {name: version(name) for name in LIBRARIES}


def machine() -> dict[str, Any]:
    """Describe this machine (CPU and usable cores), for the times a result reports."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": names[0] if names else "unknown", "cores": cores}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def finished(run_dir: Path, resolved: dict, *, ran: dict) -> dict | None:
    """Return a run directory's results if they are of exactly this configuration, code, libraries and hardware.

    Args:
        ran: what of the hardware decides numbers (`Hardware.decides`).
    """
    results = read_results(run_dir)
    return results if results is not None and _same(results, resolved, ran) else None


def read_results(run_dir: Path) -> dict | None:
    try:
        return json.loads((run_dir / "results.json").read_text())
    except (OSError, ValueError):
        return None


def _same(results: dict, resolved: dict, ran: dict) -> bool:
    made = results.get("made", {})
    hardware = made.get("hardware", {})
    if made.get("libraries") != libraries() or any(hardware.get(key) != value for key, value in ran.items()):
        return False
    return made.get("config") == hash_of(identity(resolved)) and made.get("code") == run_code(resolved)


def remember(run_dir: Path, runs: Path, resolved: dict) -> None:
    """Record where this configuration's results are, so that an identical cell of another study finds them."""
    note = _note(runs, resolved)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, os.path.relpath(run_dir, runs))


def elsewhere(runs: Path, resolved: dict, *, ran: dict) -> Path | None:
    """Return the recorded run directory with results that `finished` accepts, if there is one."""
    try:
        run_dir = runs / _note(runs, resolved).read_text()
    except OSError:
        return None
    return run_dir if finished(run_dir, resolved, ran=ran) is not None else None


def _note(runs: Path, resolved: dict) -> Path:
    return runs / "cells" / f"{hash_of(identity(resolved))}-{run_code(resolved)}"
