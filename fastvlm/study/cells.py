"""A study's results: one row a cell, from run directories, results.csv or MLflow, and from rows to verdicts."""

from __future__ import annotations

import csv
import difflib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from fastvlm.identity import read_results
from fastvlm.study.arms import Study, cell_name
from fastvlm.study.claims import Claim
from fastvlm.study.verdicts import Verdict, decide, decide_same

ABOUT = ("scale", "arm", "seed", "commit", "code", "config", "cpu", "cores", "accelerator", "precision", "threads")
COST = ("steps", "tokens", "views", "flops", "seconds")
# Left out of results.csv: what the questions score without looking, type by type.
NOT_KEPT = re.compile(r"test/exact_match_(removed|swapped|majority)/(?!mean$)|test/num_questions|test/text_tokens")
# What two runs of one cell on one machine may differ in.
TIMES = re.compile(r"seconds$|_ms\b|_per_second$|speed/")
# Of the stage trained last: its row in the results, and the unit it is shown in.
TRAINED = {"train/memory_mib": ("held_bytes", 2**20), "train/step_ms": ("step_ms", 1), "train/learned": ("learned", 1)}
# Operations within this share of each other count as equal.
EQUAL_COMPUTE = 0.05


@dataclass(frozen=True)
class Cell:
    """One run of a study: what it was, what it cost, what it reached."""

    about: dict[str, str]
    cost: dict[str, float]
    metrics: dict[str, float]

    @property
    def arm(self) -> str:
        return self.about["arm"]

    @property
    def seed(self) -> int:
        return int(self.about["seed"])


def planned(study: Study, *, scale: str) -> list[tuple[str, int]]:
    """(arm, seed) of every cell of the grid that this scale has.

    Raises:
        ValueError: the grid names an arm that does not exist.
    """
    named = [a.strip() for a in study.grid.get("arm", "").split(",") if a.strip()]
    for arm in named:
        if not any(arm in arms for arms in study.arms.values()):
            study.overrides(arm, scale)
    return [(arm, seed) for arm in named if arm in study.arms.get(scale, {}) for seed in seeds(study)]


def seeds(study: Study) -> list[int]:
    text = study.grid.get("seed", "0")
    if match := re.fullmatch(r"range\((\d+)(?:,\s*(\d+))?\)", text):
        return list(range(int(match[1]))) if match[2] is None else list(range(int(match[1]), int(match[2])))
    return [int(seed) for seed in text.split(",")]


def from_results(results: dict, *, scale: str, arm: str, seed: int) -> Cell:
    made = results["made"]
    about = {"scale": scale, "arm": arm, "seed": str(seed)} | {k: made[k] for k in ("commit", "code", "config")}
    about |= {k: str(made["hardware"][k]) for k in ("cpu", "cores", "accelerator", "precision", "threads")}
    stages = results.get("cost", {}).values()
    cost = {key: sum(stage.get(key, 0.0) for stage in stages) for key in COST}
    metrics = {k: v for k, v in sorted(results["metrics"].items()) if not NOT_KEPT.match(k)}
    return Cell(about, cost, metrics | trained(results))


def trained(results: dict) -> dict[str, float]:
    """`train/...` of the stage that was trained last: what it held from step to step, a step's time, the parameters
    that learned."""
    last = next(reversed(results.get("cost", {}).values()), {})
    return {name: last[key] / unit for name, (key, unit) in TRAINED.items() if key in last}


def read_runs(study: Study, runs: Path, *, scale: str) -> tuple[list[Cell], list[str]]:
    """Cells that run directories hold, and one line for every one they do not."""
    cells, missing = [], []
    for arm, seed in planned(study, scale=scale):
        run_dir = runs / cell_name(study.name, scale, arm, seed)
        results = read_results(run_dir)
        if results is None or "made" not in results:
            missing.append(f"arm={arm} seed={seed} has not run")
        elif not same_arm(run_dir, study, scale=scale, arm=arm):
            missing.append(f"arm={arm} seed={seed} was run before the arm was changed")
        else:
            cells.append(from_results(results, scale=scale, arm=arm, seed=seed))
    return cells, missing


def same_arm(run_dir: Path, study: Study, *, scale: str, arm: str) -> bool:
    """Whether the run was of what the arm says now, as its config.yaml remembers the arm."""
    try:
        theirs = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"), resolve=False)["study"]
    except (OSError, KeyError):
        return False
    if theirs is None or theirs["name"] != study.name:  # taken over from another study: the same configuration
        return True
    from fastvlm.study.arms import merge

    then = theirs[scale]
    own = then["arms"].get(arm)
    return own is not None and merge(list(then.get("all") or []), list(own)) == study.arms[scale][arm]


def write_csv(file: Path, cells: list[Cell]) -> None:
    """All cells of one study, sorted by scale, arm and seed: the same cells make the same bytes."""
    names = sorted({name for cell in cells for name in cell.metrics})
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*ABOUT, *COST, *names])
        for cell in sorted(cells, key=lambda c: (c.about["scale"], c.arm, c.seed)):
            cost = [f"{cell.cost[key]:.6g}" for key in COST]
            writer.writerow(
                [cell.about[k] for k in ABOUT]
                + cost
                + [f"{cell.metrics[n]:.6g}" if n in cell.metrics else "" for n in names]
            )


def read_csv(file: Path, *, scale: str | None = None) -> list[Cell]:
    """Raises:
    ValueError: the file is not one of these.
    """
    if not file.is_file():
        return []
    cells = []
    with open(file, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if lacks := [key for key in (*ABOUT, *COST) if key not in (reader.fieldnames or ())]:
            raise ValueError(f"{file} has no column {lacks[0]}: it is no results.csv of a study")
        for row in reader:
            about = {key: row.pop(key) for key in ABOUT}
            cost = {key: float(row.pop(key)) for key in COST}
            if scale in (None, about["scale"]):
                cells.append(Cell(about, cost, {k: float(v) for k, v in row.items() if v}))
    return cells


def check_one_origin(cells: list[Cell], *, command: str) -> None:
    """Refuse results that two versions of the code made.

    Two commits whose code that trains and scores is the same are one origin.

    Raises:
        ValueError: naming both commits, with the command that makes them one.
    """
    codes: dict[str, list[Cell]] = {}
    for cell in cells:
        codes.setdefault(cell.about["code"], []).append(cell)
    if len(codes) > 1:
        sides = [f"{len(group)} of commit {group[0].about['commit'][:9]}" for group in codes.values()]
        raise ValueError(
            f"the cells mix {' and '.join(sides)}, between which code that decides numbers has changed; {command}"
        )


@dataclass(frozen=True)
class Decided:
    """A claim, one of its metrics, on one basis (steps or compute), and what the seeds say.

    `verdict` is None where nothing can be said; `why` then says why.
    """

    claim: Claim
    metric: str
    basis: str
    pair: tuple[str, str]
    verdict: Verdict | None
    why: str = ""
    ratio: float = 1.0  # operations of the first arm over the second's
    as_factor: bool = False  # the verdict's numbers are natural logarithms of a factor


def by_seed(cells: list[Cell], arm: str, metric: str) -> dict[int, float]:
    return {cell.seed: cell.metrics[metric] for cell in cells if cell.arm == arm and metric in cell.metrics}


def best_values(cells: list[Cell], values: dict[str, float], metric: str) -> dict[int, float]:
    """Seed -> log2 of the value at which the metric is best: the vertex of the parabola through the best arm and its
    neighbours on a log scale, the arm itself at an end of the range."""
    arms = sorted(values, key=values.__getitem__)
    sign = 1.0 if lower_is_better(metric) else -1.0
    scores = [by_seed(cells, arm, metric) for arm in arms]
    found = {}
    for seed in sorted(set.intersection(*(set(score) for score in scores))):
        y = [sign * score[seed] for score in scores]
        x = [math.log2(values[arm]) for arm in arms]
        best = y.index(min(y))
        found[seed] = x[best]
        if 0 < best < len(arms) - 1:
            a, b, _ = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
            found[seed] = float(-b / (2 * a)) if a > 0 else x[best]
    return found


def mean_cost(cells: list[Cell], arm: str, key: str) -> float:
    values = [cell.cost[key] for cell in cells if cell.arm == arm]
    return sum(values) / len(values) if values else 0.0


def decide_claim(claim: Claim, cells: list[Cell]) -> list[Decided]:
    """Every metric of a claim, at equal steps and at equal compute; the deciding metric first. A claim about a cost has
    no equal compute.

    Raises:
        ValueError: no cell has the metric that decides.
    """
    known = sorted({name for cell in cells for name in cell.metrics})
    for metric in (claim.metric, *claim.beside):
        if cells and metric not in known:
            near = difflib.get_close_matches(metric, known, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"the claim '{claim.claim}' is decided on {metric}, which no task yielded{hint}")
    decided = []
    for metric in (claim.metric, *claim.beside):
        for basis in ("steps",) if is_cost(claim.metric) else ("steps", "compute"):
            decided.append(decide_pair(claim, metric, basis, cells))
    return decided


def decide_pair(claim: Claim, metric: str, basis: str, cells: list[Cell]) -> Decided:
    pair = tuple(claim.compute or claim.steps) if basis == "compute" else tuple(claim.steps)
    first, second = pair
    costs = [mean_cost(cells, arm, "flops") for arm in pair]
    ratio = costs[0] / costs[1] if all(costs) else 1.0
    if basis == "compute" and abs(ratio - 1) > EQUAL_COMPUTE:
        why = f"{first} takes {ratio:.2f} times the operations of {second}; no arm has as many"
        return Decided(claim, metric, basis, pair, None, why, ratio)
    if claim.optimum:
        if basis == "compute":
            return Decided(claim, metric, basis, pair, None, "a law over sizes has no equal compute", ratio)
        ours, theirs = (best_values(cells, values, metric) for values in claim.optimum)
    else:
        ours, theirs = by_seed(cells, first, metric), by_seed(cells, second, metric)
    paired = sorted(ours.keys() & theirs.keys())
    if not paired:
        return Decided(claim, metric, basis, pair, None, "no seed has both arms", ratio)
    # A metric beside the one that decides has its own good side.
    sign = -1.0 if lower_is_better(metric) else 1.0
    if metric == claim.metric:
        sign = -1.0 if claim.direction == "lower" else 1.0
    elif claim.direction != "same":
        claimed_better = (claim.direction == "lower") == lower_is_better(claim.metric)
        sign *= 1.0 if claimed_better else -1.0
    if claim.factor and metric == claim.metric:
        if bad := [value for arm in (ours, theirs) for value in arm.values() if value <= 0]:
            raise ValueError(f"the claim '{claim.claim}' is about a factor, but {metric} is {bad[0]:g} in a cell")
        # A smaller factor than the claimed one speaks against the claim, not only the wrong sign.
        claimed = math.log(claim.factor)
        v = decide([sign * math.log(ours[s] / theirs[s]) - claimed for s in paired])
        verdict = replace(v, mean=v.mean + claimed, low=v.low + claimed, high=v.high + claimed)
        return Decided(claim, metric, basis, pair, verdict, "", ratio, as_factor=True)
    differences = [sign * (ours[s] - theirs[s]) for s in paired]
    if claim.direction == "same":
        if metric != claim.metric:
            verdict = decide(differences)
            return Decided(claim, metric, basis, pair, verdict, "", ratio)
        return Decided(claim, metric, basis, pair, decide_same(differences, margin=claim.margin), "", ratio)
    margin = claim.margin if metric == claim.metric else 0.0
    return Decided(claim, metric, basis, pair, decide(differences, margin=margin), "", ratio)


def is_cost(metric: str) -> bool:
    return metric.startswith("train/") or any(word in metric for word in ("ttft", "_ms", "_per_second", "memory"))


def lower_is_better(metric: str) -> bool:
    if metric.endswith("_per_second"):
        return False
    words = ("nll", "perplexity", "bits", "ttft", "_ms", "length", "loss", "memory", "seconds", "train/learned")
    return any(word in metric for word in words)
