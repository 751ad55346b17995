"""Wall-clock time of a grid: grid.json, written by each sweep below runs/ and published beside results.csv."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from fastvlm.files import write_whole
from fastvlm.identity import read_results
from fastvlm.study.arms import Study, cell_name
from fastvlm.study.cells import Cell, ran

FILE = "grid.json"


@dataclass(frozen=True)
class Sweep:
    """One `train.py -m` of a study, until it ended or was interrupted.

    Args:
        minutes: wall-clock time, from its start to the end of its last cell.
        at_once: cells that ran in parallel; None if the launcher does not say.
        cells: `<arm>-seed<n>` of those that finished in it, without those that were done before.
        found: stages of these cells that had been trained before it, so that its time is without theirs.
    """

    scale: str
    minutes: float
    at_once: int | None
    cells: tuple[str, ...]
    found: int = 0


def began(run_dir: Path) -> float | None:
    """Return when the run began that made a directory's results, in epoch seconds (0: unknown); None without any."""
    results = read_results(run_dir)
    if results is None:
        return None
    at = results.get("made", {}).get("began")
    return datetime.strptime(at, "%Y-%m-%dT%H:%M:%S%z").timestamp() if at else 0.0


def cells_since(study: Study, runs: Path, *, scale: str, begun: float, of: Collection[str] = ()) -> tuple[str, ...]:
    """Return the cells of a study that began at `begun` or later, were trained since and have finished.

    Args:
        of: names of the cells that count; none: all of the study's.
    """
    names = []
    for arm, seed in sorted(ran(study, runs, scale=scale)):
        name = cell_name(study.name, scale, arm, seed)
        at = began(runs / name)
        # Times are recorded in whole seconds.
        if at is not None and at >= int(begun) and trained_since(runs / name, begun) and (name in of or not of):
            names.append(f"{arm}-seed{seed}")
    return tuple(names)


def trained_since(run_dir: Path, begun: float) -> bool:
    """Return whether a stage of a run was finished at `begun` or later; True for a run without stages."""
    ends = [file.stat().st_mtime for file in run_dir.glob("stages/*/handoff/manifest.json")]
    return not ends or max(ends) >= int(begun)


def stages_found(study: Study, runs: Path, *, scale: str, begun: float, cells: Iterable[str]) -> int:
    """Count the stages of some cells (`<arm>-seed<n>`) that were finished before `begun`."""
    folders = [(runs / cell_name(study.name, scale, *cell.rsplit("-seed", 1))) for cell in cells]
    manifests = {file.resolve() for folder in folders for file in folder.glob("stages/*/handoff/manifest.json")}
    return sum(file.stat().st_mtime < int(begun) for file in manifests)


def read_sweeps(file: Path) -> list[Sweep]:
    """Read the sweeps of a grid.json; none if it is missing or unreadable."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [Sweep(**row | {"cells": tuple(row["cells"])}) for row in rows]


def write_sweeps(file: Path, sweeps: Iterable[Sweep]) -> None:
    lines = ",\n".join(json.dumps(asdict(sweep)) for sweep in sweeps)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"[\n{lines}\n]\n")


def note(file: Path, sweep: Sweep) -> None:
    """Add a sweep to the file, and remove earlier ones if it ran all of their cells again."""
    if not sweep.cells:
        return
    again = {(sweep.scale, cell) for cell in sweep.cells}
    before = [one for one in read_sweeps(file) if not {(one.scale, cell) for cell in one.cells} <= again]
    write_sweeps(file, [*before, sweep])


def of_cells(sweeps: Iterable[Sweep], cells: Iterable[Cell]) -> list[Sweep]:
    """Return the sweeps in which some of these cells ran, each reduced to these cells."""
    known = {(cell.about["scale"], f"{cell.arm}-seed{cell.seed}") for cell in cells}
    kept = [replace(one, cells=tuple(c for c in one.cells if (one.scale, c) in known)) for one in sweeps]
    return [one for one in kept if one.cells]


def say_grid(sweeps: Sequence[Sweep], cells: Sequence[Cell], *, scale: str) -> str:
    """Say in one line how long the grid took; empty if that is not known."""
    sweeps = of_cells([one for one in sweeps if one.scale == scale], cells)
    if not sweeps:
        return ""
    told = {cell for one in sweeps for cell in one.cells}
    of = f" of {len(cells)}" if len(told) < len(cells) else ""
    widths = sorted({one.at_once for one in sweeps if one.at_once})
    at_once = f", {' to '.join(map(str, dict.fromkeys((widths[0], widths[-1]))))} at once" if widths else ""
    several = f" in {len(sweeps)} sweeps" if len(sweeps) > 1 else ""
    minutes, found = sum(one.minutes for one in sweeps), sum(one.found for one in sweeps)
    before = f"; {found} stage{'s' * (found > 1)} had been trained before" if found else ""
    return f"The grid: {minutes:.3g} minutes by the clock{several}, {len(told)}{of} cells{at_once}{before}."
