"""The folder of a stage: its lock, its identity, and what an interrupted run left there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from zipfile import is_zipfile

from fastvlm.hardware import is_first_rank
from fastvlm.pipeline.messages import say
from fastvlm.pipeline.ranks import agree
from fastvlm.pipeline.run_folder import differences


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the lock of a stage's folder: of two cells that share a stage, the second waits here, then finds it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        waiting = False
        while not agree(not is_first_rank() or try_lock(lock)):  # polls: no broadcast of `agree` may wait for hours
            if not waiting:
                say(f"waiting for another run that is training {folder.name}")
            waiting = True
            time.sleep(1)
        yield


def try_lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def stopped_before(link: Path, identity: dict) -> Path | None:
    """Return the folder of a run's earlier stage if it differs from the present one only in its data, else None.

    That stage was interrupted, or was finished after its data had been planned anew.

    Args:
        link: the run's link to its stage.
        identity: identity of the requested stage.
    """
    folder, of_data = link.resolve(), {"data": None, "augment": None}
    theirs = read_identity(folder)
    return folder if theirs is not None and theirs | of_data == as_read(identity) | of_data else None


def read_identity(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "identity.json").read_text())
    except (OSError, ValueError):
        return None


def as_read(identity: dict) -> dict:
    return json.loads(json.dumps(identity, default=str))


def left_behind(link: Path, identity: dict) -> str | None:
    """Return in one line at which step a run's earlier stage stopped and how it differs from the present one.

    None if it was not interrupted.
    """
    theirs, checkpoint = read_identity(link.resolve()), newest_checkpoint(link.resolve())
    if theirs is None or checkpoint is None:
        return None
    differ = list(differences(theirs, as_read(identity)))
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return f"{link.resolve().name} stopped at step {step_of(checkpoint)} and differs: {'; '.join(differ[:3])}{more}"


def augment_changes(before: dict, now: dict) -> list[str]:
    """Return one line per source that two identities of a stage share but augment differently."""
    old, new = (identity.get("augment", {}) for identity in (before, now))
    words = {name: [", ".join(kinds[name]) or "none" for kinds in (old, new)] for name in old if name in new}
    return [f"augmentation of {name} {a} -> {b}" for name, (a, b) in words.items() if a != b]


def newest_checkpoint(folder: Path) -> Path | None:
    # DeepSpeed's checkpoints are folders, complete once `latest` is written; a file cut short lacks the end of a zip.
    found = [path for path in folder.glob("step=*.ckpt") if (path / "latest").exists() or is_zipfile(path)]
    found.sort(key=step_of)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.split("=")[1])


def take_over(stopped: Path, checkpoint: Path, folder: Path) -> None:
    """Begin a stage's folder with the metrics and the checkpoint of another, which appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    if (stopped / "metrics.jsonl").exists():
        shutil.copyfile(stopped / "metrics.jsonl", folder / "metrics.jsonl")
    (shutil.copytree if checkpoint.is_dir() else shutil.copyfile)(checkpoint, folder / f".{checkpoint.name}")
    os.replace(folder / f".{checkpoint.name}", folder / checkpoint.name)
