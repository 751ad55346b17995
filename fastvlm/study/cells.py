"""A study's results: one row a cell, from run directories, results.csv or MLflow."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

from fastvlm.files import replacing
from fastvlm.identity import LIBRARIES, hash_of, identity, portable_hash, read_results
from fastvlm.study.arms import Study, cell_name, grid_arms
from fastvlm.study.composed import Composed, composed

ABOUT = ("scale", "arm", "seed", "commit", "code", "config", "cpu", "cores", "accelerator", "precision", "threads")
COST = ("steps", "tokens", "views", "flops", "seconds")
# Left out of results.csv: what the questions score without looking, type by type.
NOT_KEPT = re.compile(r"test/exact_match_(removed|swapped|majority)/(?!mean$)|test/num_questions|test/text_tokens")
# What two runs of one cell on one machine may differ in.
TIMES = re.compile(r"seconds$|_ms\b|_per_second$|speed/")
# Of the stage trained last: its row in the results, and the unit it is shown in.
TRAINED = {"train/memory_mib": ("held_bytes", 2**20), "train/step_ms": ("step_ms", 1), "train/learned": ("learned", 1)}


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
        ValueError: the grid names an arm that does not exist, or seeds that are none.
    """
    here = [arm for arm in grid_arms(study) if not study.elsewhere(arm, scale)]
    for arm in here:
        study.overrides(arm, scale)
    return [(arm, seed) for arm in here for seed in seeds(study)]


def num_ran(study: Study, runs: Path, *, scale: str) -> int:
    """Run directories of this study that hold results, of whatever configuration."""
    folders = [runs / cell_name(study.name, scale, *cell) for cell in ran(study, runs, scale=scale)]
    return sum((folder / "results.json").is_file() for folder in folders)


def seeds(study: Study) -> list[int]:
    text = study.grid.get("seed", "0")
    if match := re.fullmatch(r"range\((\d+)(?:,\s*(\d+))?\)", text):
        return list(range(int(match[1]))) if match[2] is None else list(range(int(match[1]), int(match[2])))
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        raise ValueError(f"{study.folder}/study.yaml: seed={text} is neither range(...) nor numbers with commas")
    return [int(seed) for seed in text.split(",")]


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
    """As results.csv keeps it: a page is the same, to the last digit, wherever its cells are read from."""
    return float(f"{value:.6g}")


def trained(results: dict) -> dict[str, float]:
    """`train/...` of the stage that was trained last: what it held from step to step, a step's time, the parameters
    that learned."""
    last = next(reversed(results.get("cost", {}).values()), {})
    return {name: last[key] / unit for name, (key, unit) in TRAINED.items() if key in last}


OTHER = "was run with another configuration"


@dataclass(frozen=True)
class Missing:
    """A cell that is not to be had, and why."""

    arm: str
    seed: int
    reason: str

    def __str__(self) -> str:
        return f"arm={self.arm} seed={self.seed} {self.reason}"


def read_runs(study: Study, runs: Path, *, scale: str) -> tuple[list[Cell], list[Missing]]:
    """Cells that run directories hold, those of seeds beyond the grid's too, and what they lack of the grid: a run of
    another configuration than its arm is composed to now is none of its cells."""
    cells, missing = [], []
    for arm, seed in wanted(study, ran(study, runs, scale=scale), scale=scale):
        run_dir = runs / cell_name(study.name, scale, arm, seed)
        results = read_results(run_dir)
        if results is None or "made" not in results:
            missing.append(Missing(arm, seed, "has not run"))
            continue
        cell, own = from_results(results, scale=scale, arm=arm, seed=seed), composed(study, scale=scale, arm=arm)
        if own.fault:  # told in a remark of the page
            cells.append(cell)
        elif now(run_dir, results["made"], own, seed=seed):
            cells.append(replace(cell, about=cell.about | {"config": own.hash(seed)}))
        else:
            missing.append(Missing(arm, seed, OTHER))
    return cells, missing


def ran(study: Study, runs: Path, *, scale: str) -> list[tuple[str, int]]:
    """(arm, seed) of every run directory that is a cell of this study, begun or done; one in which more was changed
    than the arm is none, and none is the empty one of a dry run."""
    folder = (runs / cell_name(study.name, scale, "arm", 0)).parent
    begun = [path.name for path in folder.glob("*-seed*") if path.is_dir() and any(path.iterdir())]
    matches = [re.fullmatch(r"(.+)-seed(\d+)", name) for name in begun]
    arms = study.arms.get(scale, {})
    return [(match[1], int(match[2])) for match in matches if match and match[1] in arms]


def wanted(study: Study, found: Iterable[tuple[str, int]], *, scale: str) -> list[tuple[str, int]]:
    """The cells of the grid and those found beside it, by arm and seed."""
    places = {arm: place for place, arm in enumerate(study.arms.get(scale, {}))}
    return sorted({*planned(study, scale=scale), *found}, key=lambda cell: (places[cell[0]], cell[1]))


def now(run_dir: Path, made: dict, arm: Composed, *, seed: int) -> bool:
    """Whether a run's results are of the configuration that its arm has now. One that ran where data lie elsewhere is
    known by its config.yaml, if that is still what the results were made by."""
    if arm.knows(made["config"], seed=seed):
        return True
    try:
        theirs = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"), resolve=False)
        return hash_of(identity(theirs)) == made["config"] and portable_hash(theirs) == arm.hash(seed)
    except (OSError, KeyError):
        return False


def write_csv(file: Path, cells: list[Cell]) -> None:
    """All cells of one study, sorted by scale, arm and seed: the same cells make the same bytes."""
    names = sorted({name for cell in cells for name in cell.metrics})
    with replacing(file) as part, open(part, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        # Results of before libraries were noted keep their form.
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
    """Raises:
    ValueError: the file is not one of these, with the line that is not.
    """
    if not file.is_file():
        return []
    cells: dict[tuple[str, str, int], Cell] = {}
    with open(file, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if lacks := [key for key in (*ABOUT, *COST) if key not in (reader.fieldnames or ())]:
            raise ValueError(f"{file} has no column {lacks[0]}: it is no results.csv of a study")
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
    """Refuse to pair results that two versions of the code or of a library made, or two kinds of hardware.

    Two commits whose code that trains and scores is the same are one origin. What older results do not say is taken to
    be the same.

    Args:
        command: runs the study; the cells' seeds are added to it.

    Raises:
        ValueError: naming both sides, with the command that makes them one.
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
