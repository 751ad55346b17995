"""Identity of a run: its configuration, the code that determines its results, its commit. Imports nothing heavy."""

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

ROOT = Path(__file__).resolve().parent.parent

# Keys that say where, how fast and under which name something runs: never part of a stage's or a run's identity.
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
# The code that decides a trained weight.
CODE = ("tokens.py", "batch.py", "models", "data", "stages", "callbacks/freezing.py", "callbacks/handoff.py")
# The code that decides a result: what trains, what scores, and what chooses precision, threads and micro-batches.
SCORING = (*CODE, "evaluation", "inference", "pipeline", "callbacks", "build.py", "hardware.py")
# The libraries whose versions a result's numbers depend on most.
LIBRARIES = ("torch", "transformers")


@cache
def code_hash(code: tuple[str, ...] = CODE) -> str:
    """Hash of the source files that determine what a stage learns; documents and reports are not among them."""
    package = ROOT / "fastvlm"
    files = sorted(
        f for entry in code for f in ([package / entry] if entry.endswith(".py") else (package / entry).rglob("*.py"))
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


# Pages and results that a study writes while the next one runs say nothing of the code.
WRITTEN = [f":(exclude,glob)experiments/**/{name}" for name in ("README.md", "results.csv", "grid.json", "*.svg")]


@cache
def commit() -> str:
    """The commit of this checkout, with `-dirty` where files differ from it; `unknown` outside git."""
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
    """The part of a resolved configuration that decides a run's results."""
    return {key: value for key, value in resolved.items() if key not in INCIDENTAL}


def portable_hash(resolved: dict) -> str:
    """Hash of a run's identity in which the folders of `paths` are replaced by names: the same on every machine."""
    places = sorted(resolved["paths"].items(), key=lambda item: -len(item[1]))

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [named(inner) for inner in value]
        if isinstance(value, str):
            for name, place in places:
                if value == place or value.startswith(f"{place}/"):
                    return f"<{name}>{value[len(place) :]}"
        return value

    return hash_of(named(identity(resolved)))


@cache
def libraries() -> dict[str, str]:
    """Installed versions of `LIBRARIES`, without importing them."""
    return {name: version(name) for name in LIBRARIES}


def machine() -> dict[str, Any]:
    """The machine that a result's times were measured on."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": names[0] if names else "unknown", "cores": cores}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def finished(run_dir: Path, resolved: dict) -> dict | None:
    """The results of a run directory if they are of exactly this configuration, code and libraries; else None."""
    results = read_results(run_dir)
    return results if results is not None and _same(results, resolved) else None


def read_results(run_dir: Path) -> dict | None:
    try:
        return json.loads((run_dir / "results.json").read_text())
    except (OSError, ValueError):
        return None


def _same(results: dict, resolved: dict) -> bool:
    made = results.get("made", {})
    if made.get("libraries") != libraries():
        return False
    return made.get("config") == hash_of(identity(resolved)) and made.get("code") == code_hash(SCORING)


def remember(run_dir: Path, runs: Path, resolved: dict) -> None:
    """Note where this configuration's results are, for a cell of another study that is the same."""
    note = _note(runs, resolved)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, os.path.relpath(run_dir, runs))


def elsewhere(runs: Path, resolved: dict) -> Path | None:
    """A run directory of another name that holds the results of this configuration and code."""
    try:
        run_dir = runs / _note(runs, resolved).read_text()
    except OSError:
        return None
    return run_dir if finished(run_dir, resolved) is not None else None


def _note(runs: Path, resolved: dict) -> Path:
    return runs / "cells" / f"{hash_of(identity(resolved))}-{code_hash(SCORING)}"
