"""A study's results: one row per cell, from run directories, results.csv or MLflow."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

from fastvlm.files import replacing
from fastvlm.identity import LIBRARIES, hash_of, identity, portable_hash, read_results
from fastvlm.study.arms import Study, cell_name, grid_arms, swept
from fastvlm.study.composed import Composed, composed

ABOUT = ("scale", "arm", "seed", "commit", "code", "config", "cpu", "cores", "accelerator", "precision", "threads")
COST = ("steps", "tokens", "views", "flops", "seconds")
# Left out of results.csv: the blind baselines' scores for each question type, and counts.
NOT_KEPT = re.compile(r"test/exact_match_(removed|swapped|majority)/(?!mean$)|test/num_questions|test/text_tokens")
# Metrics that may differ between two runs of one cell on one machine.
TIMES = re.compile(r"seconds$|_ms\b|_per_second$|speed/")
# Metrics of the stage trained last: name -> (key in the results' cost, divisor for the unit shown).
TRAINED = {"train/memory_mib": ("held_bytes", 2**20), "train/step_ms": ("step_ms", 1), "train/learned": ("learned", 1)}


@dataclass(frozen=True)
class Cell:
    """One run of a study: what was run (keys of `ABOUT`), what it cost (keys of `COST`) and its metrics."""

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
    """Return (arm, seed) of every cell of the grid that this scale has.

    Raises:
        ValueError: the grid names an arm that does not exist, or invalid seeds.
    """
    here = [arm for arm in grid_arms(study) if not study.elsewhere(arm, scale)]
    for arm in here:
        study.overrides(arm, scale)
    return [(arm, seed) for arm in here for seed in seeds(study)]


def num_ran(study: Study, runs: Path, *, scale: str) -> int:
    """Count the run directories of this study that hold results, of any configuration."""
    folders = [runs / cell_name(study.name, scale, *cell) for cell in ran(study, runs, scale=scale)]
    return sum((folder / "results.json").is_file() for folder in folders)


def seeds(study: Study) -> list[int]:
    text = study.grid.get("seed", "0")
    if match := re.fullmatch(r"range\((\d+(?:\s*,\s*\d+){0,2})\)", text):
        return list(range(*map(int, match[1].split(","))))
    if not all(seed.isdecimal() for seed in swept(text)):
        raise ValueError(f"{study.folder}/study.yaml: seed={text} is neither range(0,5) nor numbers with commas")
    return [int(seed) for seed in swept(text)]


def from_results(results: dict, *, scale: str, arm: str, seed: int) -> Cell:
    made = results["made"]
    about = {"scale": scale, "arm": arm, "seed": str(seed)} | {k: made[k] for k in ("commit", "code", "config")}
    about |= {k: str(made["hardware"][k]) for k in ("cpu", "cores", "accelerator", "precision", "threads")}
    about |= made.get("libraries", {})
    stages = results.get("cost", {}).values()
    cost = {key: six_digits(sum(stage.get(key, 0.0) for stage in stages)) for key in COST}
    metrics = {k: v for k, v in sorted(results["metrics"].items()) if not NOT_KEPT.match(k)}
    return Cell(about, cost, {k: six_digits(v) for k, v in (metrics | trained(results)).items()})


def six_digits(value: float) -> float:
    """Round as results.csv does, so that a page is the same to the last digit wherever its cells are read from."""
    return float(f"{value:.6g}")


def trained(results: dict) -> dict[str, float]:
    """Return `train/...` of the stage trained last: memory held between steps, time per step, learned parameters."""
    last = next(reversed(results.get("cost", {}).values()), {})
    return {name: last[key] / unit for name, (key, unit) in TRAINED.items() if key in last}


OTHER = "was run with another configuration"


@dataclass(frozen=True)
class Missing:
    """A cell without usable results, and why."""

    arm: str
    seed: int
    reason: str

    def __str__(self) -> str:
        return f"arm={self.arm} seed={self.seed} {self.reason}"


def read_runs(study: Study, runs: Path, *, scale: str) -> tuple[list[Cell], list[Missing]]:
    """Read a study's cells from its run directories, including seeds outside the grid; return them and what is missing.

    A run counts as missing if its configuration is not the one that its arm composes to now.
    """
    cells, missing = [], []
    for arm, seed in wanted(study, ran(study, runs, scale=scale), scale=scale):
        run_dir = runs / cell_name(study.name, scale, arm, seed)
        results = read_results(run_dir)
        if results is None or "made" not in results:
            missing.append(Missing(arm, seed, "has not run"))
            continue
        cell, own = from_results(results, scale=scale, arm=arm, seed=seed), composed(study, scale=scale, arm=arm)
        if own.fault:  # a remark on the page says so
            cells.append(cell)
        elif now(run_dir, results["made"], own, seed=seed):
            cells.append(replace(cell, about=cell.about | {"config": own.hash(seed)}))
        else:
            missing.append(Missing(arm, seed, OTHER))
    return cells, missing


def ran(study: Study, runs: Path, *, scale: str) -> list[tuple[str, int]]:
    """Return (arm, seed) of every run directory that is a cell of this study, begun or done.

    Runs with more changed than the arm and the empty directories of dry runs do not count.
    """
    folder = (runs / cell_name(study.name, scale, "arm", 0)).parent
    begun = [path.name for path in folder.glob("*-seed*") if path.is_dir() and any(path.iterdir())]
    matches = [re.fullmatch(r"(.+)-seed(\d+)", name) for name in begun]
    arms = study.arms.get(scale, {})
    return [(match[1], int(match[2])) for match in matches if match and match[1] in arms]


def wanted(study: Study, found: Iterable[tuple[str, int]], *, scale: str) -> list[tuple[str, int]]:
    """Return the cells of the grid and those found outside it, sorted by arm and seed."""
    places = {arm: place for place, arm in enumerate(study.arms.get(scale, {}))}
    return sorted({*planned(study, scale=scale), *found}, key=lambda cell: (places[cell[0]], cell[1]))


def now(run_dir: Path, made: dict, arm: Composed, *, seed: int) -> bool:
    """Return whether a run's results belong to the present configuration of its arm.

    A run with other data paths is recognised by its config.yaml, if the results were made with that.
    """
    if arm.knows(made["config"], seed=seed):
        return True
    try:
        theirs = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"), resolve=False)
        return hash_of(identity(theirs)) == made["config"] and portable_hash(theirs) == arm.hash(seed)
    except (OSError, KeyError):
        return False


def write_csv(file: Path, cells: list[Cell]) -> None:
    """Write all cells of one study, sorted by scale, arm and seed: the same cells give the same bytes."""
    names = sorted({name for cell in cells for name in cell.metrics})
    with replacing(file) as part, open(part, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        # Results from before library versions were recorded keep their columns.
        about = [*ABOUT, *(key for key in LIBRARIES if any(cell.about.get(key) for cell in cells))]
        writer.writerow([*about, *COST, *names])
        for cell in sorted(cells, key=lambda c: (c.about["scale"], c.arm, c.seed)):
            cost = [f"{cell.cost[key]:.6g}" for key in COST]
            writer.writerow(
                [cell.about.get(k, "") for k in about]
                + cost
                + [f"{cell.metrics[n]:.6g}" if n in cell.metrics else "" for n in names]
            )


def read_csv(file: Path, *, scale: str | None = None) -> list[Cell]:
    """Read the cells of a results.csv; none if the file is missing.

    Raises:
        ValueError: not a results.csv, or a malformed or duplicate line, with its number.
    """
    if not file.is_file():
        return []
    cells: dict[tuple[str, str, int], Cell] = {}
    with open(file, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if lacks := [key for key in (*ABOUT, *COST) if key not in (reader.fieldnames or ())]:
            raise ValueError(f"{file} has no column {lacks[0]}: it is not the results.csv of a study")
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            remedy = "restore the file, or remove it and report from=runs"
            if None in row or None in row.values():
                raise ValueError(f"{where} has not the {len(reader.fieldnames)} values of its header; {remedy}")
            try:
                cell = _of_row(row)
                key = (cell.about["scale"], cell.arm, cell.seed)
            except ValueError as error:
                raise ValueError(f"{where}: {error}; {remedy}") from None
            if key in cells:
                raise ValueError(f"{where}: scale={key[0]} arm={key[1]} seed={key[2]} stands twice; {remedy}")
            cells[key] = cell
    return [cell for cell in cells.values() if scale in (None, cell.about["scale"])]


def _of_row(row: dict[str, str]) -> Cell:
    about = {key: row.pop(key) for key in (*ABOUT, *LIBRARIES) if key in row}
    cost = {key: float(row.pop(key)) for key in COST}
    return Cell(about, cost, {key: float(value) for key, value in row.items() if value})


def check_one_origin(cells: list[Cell], *, command: str) -> None:
    """Refuse to pair results from different versions of the code or of a library, accelerators or precisions.

    Commits with the same training and scoring code are the same version. What older results do not record is taken to
    be the same.

    Args:
        command: runs the study; the cells' seeds are added to it.

    Raises:
        ValueError: names both sides and the command that runs the outdated cells again.
    """
    changed = "between which code that decides numbers has changed"
    kinds = {"code": ("of commit", changed), "accelerator": ("on", ""), "precision": ("in", "")}
    kinds |= {key: (f"with {key}", "") for key in LIBRARIES}
    for key, (word, why) in kinds.items():
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.about.get(key):
                groups.setdefault(cell.about[key], []).append(cell)
        if len(groups) > 1:
            names = {one: group[0].about["commit"][:9] if key == "code" else one for one, group in groups.items()}
            sides = " and ".join(f"{len(group)} {word} {names[one]}" for one, group in groups.items())
            seeds_of = ",".join(map(str, sorted({cell.seed for cell in cells})))
            why = f", {why}" if why else ", which are no pairs"
            raise ValueError(
                f"the cells mix {sides}{why}; {command} seed={seeds_of} runs again those that are not this version's"
            )


def mean_cost(cells: list[Cell], arm: str, key: str) -> float:
    values = [cell.cost[key] for cell in cells if cell.arm == arm]
    return sum(values) / len(values) if values else 0.0
