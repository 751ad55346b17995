"""Overhead of a study's sweep over starting the same runs one by one, and where it arises.

    python benchmarks/sweep.py                      # about four minutes on two cores
    python benchmarks/sweep.py steps=40 seeds=3 rounds=2

A study of two short arms of the embedded pipeline is run in turn as `train.py -m experiment=...` and cell by cell, each
time in an empty run directory with the same data, one process at a time, with MLflow. Reports wall seconds and CPU
seconds of all processes, which depend less on other load. The sweep's overhead is split into before the first cell, in
cells, and after the last cell (tables, plots, verdicts, MLflow artifacts).
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUDY = """# @package _global_
# Two short arms
study:
  name: short
  micro:
    all: [pipeline=align, task=panel, task.limit=4, task.records=8, task.text_limit=2, stages.align.steps={steps}]
    arms: {{few: [resampler.num_tokens=4], many: []}}
hydra: {{sweeper: {{params: {{arm: "few,many", seed: range({seeds})}}}}}}
"""
CLAIM = """
- claim: Few tokens are better.
  paper: none
  table: none
  metric: test/answer_nll
  direction: lower
  steps: [few, many]
"""


@dataclass
class Spent:
    """Wall and CPU seconds of a series of commands; `marks`: wall seconds at which the cells and the report begin."""

    wall: float
    cpu: float
    marks: list[float] = field(default_factory=list)


def spend(commands: list[list[str]], *, folder: Path, studies: Path) -> Spent:
    """Run commands one after the other in the run directory `folder`."""
    env = os.environ | {"FASTVLM_RUNS": str(folder), "FASTVLM_STUDIES": str(studies)}
    env = {"OMP_NUM_THREADS": "1"} | env
    before, start, marks = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), []
    for command in commands:
        process = subprocess.Popen(
            [sys.executable, "train.py", *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if re.match(r"#\d+ |short$", line):  # the start of a cell or of the report
                marks.append(time.perf_counter() - start)
        if process.wait():
            raise SystemExit(f"train.py {' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(time.perf_counter() - start, cpu, marks)


def main(arguments: list[str]) -> None:
    given = {"steps": 40, "seeds": 2, "rounds": 2} | {k: int(v) for k, _, v in (a.partition("=") for a in arguments)}
    if unknown := given.keys() - {"steps", "seeds", "rounds"}:
        raise SystemExit(f"{sorted(unknown)[0]}= is not one of steps=, seeds=, rounds=")
    cells = [f"arm={arm} seed={seed}".split() for arm in ("few", "many") for seed in range(given["seeds"])]
    sweep = [["-m", "experiment=short", "hydra.launcher.parallel=1"]]
    one_by_one = [["experiment=short", *cell] for cell in cells]
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    parts: dict[str, list[float]] = {"before the first cell": [], "a cell": [], "after the last": []}
    with tempfile.TemporaryDirectory() as temporary:
        studies = Path(temporary) / "studies"
        (studies / "short").mkdir(parents=True)
        (studies / "short" / "study.yaml").write_text(STUDY.format(**given))
        (studies / "short" / "claims.yaml").write_text(CLAIM)
        spend([one_by_one[0]], folder=Path(temporary) / "warm", studies=studies)  # data, byte code, page cache
        for turn in range(given["rounds"]):
            both = {"sweep": sweep, "bare": one_by_one}
            if turn % 2:
                both = dict(reversed(both.items()))
            spent = {
                name: spend(commands, folder=Path(temporary) / f"{name}{turn}", studies=studies)
                for name, commands in both.items()
            }
            ours, theirs = spent["sweep"], spent["bare"]
            for kind, values in ratios.items():
                values.append(getattr(ours, kind) / getattr(theirs, kind))
            *begun, report = ours.marks
            parts["before the first cell"].append(begun[0])
            parts["a cell"].append((report - begun[0]) / len(cells) - theirs.wall / len(cells))
            parts["after the last"].append(ours.wall - report)
            print(
                f"round {turn + 1}: {len(cells)} cells, sweep {ours.wall:.1f} s ({ours.cpu:.1f} CPU), "
                f"one by one {theirs.wall:.1f} s ({theirs.cpu:.1f} CPU), load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    for kind, values in ratios.items():
        print(f"sweep over one by one, {kind}: " + ", ".join(f"{100 * (value - 1):+.1f} %" for value in values))
    for name, values in parts.items():
        print(f"  {name}: {statistics.median(values):+.2f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
