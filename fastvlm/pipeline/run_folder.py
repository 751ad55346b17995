"""The folder of a run: its configuration and the links to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fastvlm.build import load_yaml
from fastvlm.files import write_whole
from fastvlm.identity import INCIDENTAL, named_folders

MIXTURE = r"stages\.\w+\.mixture\b"
ON_CHANGE = (
    "data.on_change=replan goes on with the new data from the samples already seen, "
    "data.on_change=restart begins the stage anew"
)


def check_run_dir(run_dir: Path, *, resolved: dict) -> None:
    """Refuse a run directory that holds another configuration; a study's cell may replace an older one of its arm.

    Raises:
        ValueError: it does; names the first keys that differ.
    """
    path = run_dir / "config.yaml"
    if path.exists() and not resolved["overwrite"]:
        theirs = OmegaConf.to_container(load_yaml(path))
        differ = [] if same_cell(theirs, resolved) else differences_that_count(theirs, resolved)
        if differ:
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            remedy = "choose name=<another> or overwrite=true"
            if all(re.match(MIXTURE, d) for d in differ):
                remedy = f"{ON_CHANGE}, name=<another> makes another run"
            raise ValueError(f"{run_dir} holds another configuration ({'; '.join(differ[:3])}{more}); {remedy}")


def claim_run_dir(run_dir: Path, *, runs: Path, resolved: dict) -> None:
    """Claim a run directory for a configuration and point `runs/latest` at it."""
    path = run_dir / "config.yaml"
    run_dir.mkdir(parents=True, exist_ok=True)
    # From here on, the content of the run directory belongs to this command.
    (run_dir / "lineage.json").unlink(missing_ok=True)
    replaced = resolved["overwrite"] or (
        path.exists() and differences_that_count(OmegaConf.to_container(load_yaml(path)), resolved)
    )
    if replaced:  # the old results have another configuration
        for name in ("results.json", "report.html"):
            (run_dir / name).unlink(missing_ok=True)
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(resolved)))
    point(runs / "latest", at=run_dir)


def same_cell(theirs: dict, ours: dict) -> bool:
    """Return whether both are the same cell of a study, which runs again when its arm has changed."""
    keys = ("scale", "arm", "seed", "name")
    cell = lambda config: [(config.get("study") or {}).get("name"), *(config.get(key) for key in keys)]
    return bool(ours.get("study")) and cell(theirs) == cell(ours)


def differences_that_count(theirs: dict, ours: dict) -> list[str]:
    """Return the differences between two resolved configurations that make them different runs.

    A folder of `paths` may lie elsewhere since: what is in it has kept its name.
    """
    theirs, ours = (named_folders(config, config.get("paths", {})) for config in (theirs, ours))
    silent = [rf"({'|'.join(INCIDENTAL)})\b", r"[^:]*\.cache_features:"]
    if ours["data"]["on_change"] != "refuse":
        silent.append(MIXTURE)
    return [d for d in differences(theirs, ours) if not any(re.match(pattern, d) for pattern in silent)]


def differences(theirs: Any, ours: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys at which two plain configurations differ, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}, key=str):
            yield from differences(theirs.get(key), ours.get(key), f"{prefix}{key}.")
    elif isinstance(theirs, dict) and ours is None or isinstance(ours, dict) and theirs is None:
        yield f"{prefix[:-1]}: only {'here' if theirs is None else 'there'}"
    elif theirs != ours:
        yield f"{prefix[:-1]}: {theirs} there, {ours} here"


def point(link: Path, *, at: Path) -> None:
    """Create or replace a relative link to a folder, atomically."""
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    beside.symlink_to(os.path.relpath(at, link.parent), target_is_directory=True)
    beside.replace(link)
