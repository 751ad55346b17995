"""How long a grid took by the clock: grid.json, noted by each sweep below runs/, published beside results.csv."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
    """One `train.py -m` of a study, to its end or its Ctrl-C.

    Args:
        minutes: from its first cell to its page.
        at_once: cells side by side; None where a launcher does not say.
        cells: `<arm>-seed<n>` of those that ended in it; what was found done is none.
    """

    scale: str
    minutes: float
    at_once: int | None
    cells: tuple[str, ...]


def began(run_dir: Path) -> float | None:
    """When the run began that a run directory's results are of, 0 where they do not say; None without results."""
    results = read_results(run_dir)
    if results is None:
        return None
    at = results.get("made", {}).get("began")
    return datetime.strptime(at, "%Y-%m-%dT%H:%M:%S%z").timestamp() if at else 0.0


def cells_since(study: Study, runs: Path, *, scale: str, begun: float) -> tuple[str, ...]:
    """Cells of a study that began, and have ended, since then."""
    names = []
    for arm, seed in sorted(ran(study, runs, scale=scale)):
        at = began(runs / cell_name(study.name, scale, arm, seed))
        if at is not None and at >= int(begun):  # noted in whole seconds
            names.append(f"{arm}-seed{seed}")
    return tuple(names)


def read_sweeps(file: Path) -> list[Sweep]:
    """The sweeps a grid.json tells of; none without one."""
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
    """Add a sweep; an earlier one all of whose cells it ran again is no part of the grid any more."""
    if not sweep.cells:
        return
    again = {(sweep.scale, cell) for cell in sweep.cells}
    before = [one for one in read_sweeps(file) if not {(one.scale, cell) for cell in one.cells} <= again]
    write_sweeps(file, [*before, sweep])


def of_cells(sweeps: Iterable[Sweep], cells: Iterable[Cell]) -> list[Sweep]:
    """Those sweeps in which some of these cells ran, with them alone."""
    known = {(cell.about["scale"], f"{cell.arm}-seed{cell.seed}") for cell in cells}
    kept = [replace(one, cells=tuple(c for c in one.cells if (one.scale, c) in known)) for one in sweeps]
    return [one for one in kept if one.cells]


def say_grid(sweeps: Sequence[Sweep], cells: Sequence[Cell], *, scale: str) -> str:
    """The grid by the clock in a line; empty where it is not known."""
    sweeps = of_cells([one for one in sweeps if one.scale == scale], cells)
    if not sweeps:
        return ""
    told = {cell for one in sweeps for cell in one.cells}
    of = f" of {len(cells)}" if len(told) < len(cells) else ""
    widths = sorted({one.at_once for one in sweeps if one.at_once})
    at_once = f", {' to '.join(map(str, dict.fromkeys((widths[0], widths[-1]))))} at once" if widths else ""
    several = f" in {len(sweeps)} sweeps" if len(sweeps) > 1 else ""
    minutes = sum(one.minutes for one in sweeps)
    return f"The grid: {minutes:.3g} minutes by the clock{several}, {len(told)}{of} cells{at_once}."
