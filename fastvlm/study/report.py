"""Write a study's results.csv, plots and README.md, and the catalogue of all studies."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from fastvlm.files import write_whole
from fastvlm.study.arms import STUDIES, Study, load_study, study_names, unreadable
from fastvlm.study.cells import Cell, Missing, check_one_origin, mean_cost, planned, read_csv, read_runs, write_csv
from fastvlm.study.claims import Claim, all_claims, figures_of, load_figures
from fastvlm.study.composed import composed, one_training, told_apart
from fastvlm.study.decisions import Decided, decide_claim
from fastvlm.study.grid import FILE, Sweep, of_cells, read_sweeps, write_sweeps
from fastvlm.study.metrics import metric_of
from fastvlm.study.plots import make_plots
from fastvlm.study.readme import catalogue, headline, number, readme, say_left_out, say_ours

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("auto", "runs", "csv", "mlflow")


def runs_folder() -> Path:
    return Path(os.environ.get("FASTVLM_RUNS", ROOT / "runs")).resolve()


@dataclass(frozen=True)
class Gathered:
    """The cells of one scale.

    Args:
        missing: cells of the grid without results.
        others: arms with cells of another configuration.
        remarks: sentences about these for the page.
        ran_here: the cells come from run directories.
    """

    cells: list[Cell]
    missing: list[Missing]
    others: frozenset[str]
    remarks: list[str]
    ran_here: bool


def gather(study: Study, *, scale: str, source: str, uri: str | None = None) -> Gathered:
    """Collect the cells of one scale from `runs`, `csv`, `mlflow`, or `auto`: run directories if any, else results.csv.

    Raises:
        ValueError: an unknown source.
    """
    if source not in SOURCES:
        raise ValueError(f"from={source} is not one of {', '.join(SOURCES)}")
    cells, missing, ran_here = [], [], False
    if source == "mlflow":
        from fastvlm.study.recorded import read_mlflow

        cells, missing = read_mlflow(study, scale=scale, uri=uri or f"sqlite:///{runs_folder()}/mlflow.db")
    elif source != "csv":
        cells, missing = read_runs(study, runs_folder(), scale=scale)
        ran_here = bool(cells)
    if source == "csv" or (source == "auto" and not cells):
        cells = read_csv(study.folder / "results.csv", scale=scale)
        lacks = sorted({*planned(study, scale=scale)} - {(cell.arm, cell.seed) for cell in cells}) if cells else []
        missing = [Missing(arm, seed, "is not in results.csv") for arm, seed in lacks]
    cells, others, remarks = told_apart(study, cells, scale=scale)
    return Gathered(cells, missing, others, remarks, ran_here)


def report(name: str, *, source: str = "auto", uri: str | None = None, root: Path = STUDIES) -> dict:
    """Write results.csv, plots and README.md of a study.

    They go into its folder, or below runs/ if the folder's results.csv has cells that are missing here, or of another
    precision or number of threads: neither a part nor a run with other hardware settings replaces what is published.

    Returns:
        For each scale that ran, `verdicts` (one line per claim) and `missing` (cells); `remarks`; `files` (the page
        first); `entries` of the catalogue.

    Raises:
        ValueError: an arm, a metric or a figure that does not exist; cells of two origins.
    """
    study = load_study(name, root=root)
    claims, found = all_claims(study), {}
    figures = figures_of(study, claims)
    claims_of = {scale: [claim for claim in claims if not claim.lacks(arms)] for scale, arms in study.arms.items()}
    for scale in study.arms:
        found[scale] = gather(study, scale=scale, source=source, uri=uri)
        check_one_origin(found[scale].cells, command=f"python train.py -m experiment={name} scale={scale}")
    cells_of = {scale: one.cells for scale, one in found.items()}
    out, remarks = place_of(study, cells_of)
    kept = [cell for cells in cells_of.values() for cell in cells]
    if kept:  # first, so that a claim that cannot be decided loses no results
        write_csv(out / "results.csv", kept)
    sweeps = grid_of(study, found, out=out)
    results: dict[str, tuple[list[Cell], list[list[Decided]]]] = {
        scale: (one.cells, decide(study, claims_of[scale], one, scale=scale, sweeps=sweeps) if one.cells else [])
        for scale, one in found.items()
    }
    ran = {scale: cells for scale, cells in cells_of.items() if cells}
    plots = {s: make_plots(study, cells, claims_of[s], folder=out, scale=s) for s, cells in ran.items()}
    notes = study.folder / "notes.md"
    text = readme(
        study,
        claims=claims_of,
        figures=figures,
        results=results,
        plots=plots,
        left_out={
            scale: [say_left_out(claim, lacks) for claim in claims if (lacks := claim.lacks(arms))]
            for scale, arms in study.arms.items()
        },
        notes=notes.read_text(encoding="utf-8") if notes.is_file() else "",
        missing={scale: one.missing for scale, one in found.items()},
        remarks={scale: one.remarks for scale, one in found.items()},
        sweeps=sweeps,
    )
    write_whole(out / "README.md", text)
    files = [out / "README.md", *(out / plot for names in plots.values() for plot in names)]
    return {
        "verdicts": {s: [f"{d[0].claim.claim} - {headline(d)}" for d in results[s][1]] for s in ran},
        "missing": {scale: found[scale].missing for scale in ran},
        "remarks": [*remarks, *(line for one in found.values() for line in one.remarks)],
        "files": files + ([out / "results.csv"] if kept else []) + ([out / FILE] if sweeps else []),
        "entries": entries(study, results, claims_of),
    }


def grid_of(study: Study, found: dict[str, Gathered], *, out: Path) -> list[Sweep]:
    """Return the sweeps in which these cells ran, as recorded below runs/ or else as published; write them to `out`."""
    here = runs_folder() / "studies" / study.name / FILE
    sweeps = []
    for scale, one in found.items():
        noted = of_cells(read_sweeps(here), one.cells) if one.ran_here else []
        noted = noted or of_cells(read_sweeps(study.folder / FILE), one.cells)
        sweeps += [sweep for sweep in noted if sweep.scale == scale]
    if sweeps and out / FILE != here:
        write_sweeps(out / FILE, sweeps)
    return sweeps


def decide(
    study: Study, claims: list[Claim], found: Gathered, *, scale: str, sweeps: list[Sweep]
) -> list[list[Decided]]:
    """Decide every claim; add the parts that an arm trained only once and whether cells have another configuration."""

    def known(one: Decided) -> Decided:
        other = any(arm in found.others for side in one.compared for arm in side)
        if one.verdict is None or metric_of(one.metric).cost:
            return replace(one, other=other)
        first, second = ([composed(study, scale=scale, arm=arm) for arm in side] for side in one.compared)
        return replace(one, below=one_training(first, second), other=other)

    options = {"arms": study.arms[scale], "sweeps": [sweep for sweep in sweeps if sweep.scale == scale]}
    return [[known(one) for one in decide_claim(claim, found.cells, **options)] for claim in claims]


def place_of(study: Study, cells_of: dict[str, list[Cell]]) -> tuple[Path, list[str]]:
    """Return the page's folder and remarks on it.

    It is the study's own, unless results.csv there has cells, of arms that still exist, that are missing here, or its
    cells ran in another precision or with other threads, as with `hardware=cpu`.
    """

    def keys(cells: Iterable[Cell]) -> set[tuple[str, str, int]]:
        return {(c.about["scale"], c.arm, c.seed) for c in cells if c.arm in study.arms.get(c.about["scale"], {})}

    def hardware(cells: Iterable[Cell], scale: str) -> str:
        ran = {f"{c.about['precision']}, {c.about['threads']} thread(s)" for c in cells if c.about["scale"] == scale}
        return " and ".join(sorted(ran))

    kept = [cell for cells in cells_of.values() for cell in cells]
    before = read_csv(study.folder / "results.csv")
    ran = [(hardware(before, scale), hardware(cells, scale)) for scale, cells in cells_of.items()]
    others = [(theirs, ours) for theirs, ours in ran if theirs and ours and theirs != ours]
    if keys(before) <= keys(kept) and not others:
        return study.folder, []
    out = runs_folder() / "studies" / study.name
    out.mkdir(parents=True, exist_ok=True)
    remark = f"{study.folder} keeps its {len(before)} cells; these {len(kept)} are reported in {out}"
    if others:
        remark += f": they ran in {others[0][1]}, not in {others[0][0]} (to publish them, remove results.csv there)"
    return out, [remark]


def say(made: dict) -> list[str]:
    """Return the lines that a command prints about a report: verdicts and missing cells of every scale that ran."""
    lines = [] if made["verdicts"] else ["no cell has run"]
    for scale, verdicts in made["verdicts"].items():
        lines += [f"scale={scale}", *(f"  {line}" for line in (*verdicts, *made["missing"][scale]))]
    return lines + made["remarks"]


def entries(study: Study, results: dict, claims_of: dict[str, list[Claim]]) -> list[dict[str, Any]]:
    """Return the study's lines of the catalogue: one per claim for each scale that ran, or of the first if none ran."""
    figures = load_figures(study.folder)
    ran = [scale for scale, (cells, _) in results.items() if cells] or list(results)[:1]
    lines = []
    for scale, place, claim in ((s, place, claim) for s in ran for place, claim in enumerate(claims_of[s])):
        cells, decided = results[scale]
        theirs = "; ".join(f"{k.replace('_', ' ')} {figures[k].value} ({figures[k].status})" for k in claim.figures)
        ours, verdict, cost, outcomes = "not run", "not run", "-", set()
        if cells:
            verdict = headline(decided[place])
            deciding = [d for d in decided[place] if d.metric == claim.metric]
            ours, outcomes = say_ours(deciding), {d.verdict.outcome for d in deciding if d.verdict}
            have = [arm for arm in claim.pair if any(cell.arm == arm for cell in cells)]
            if have:
                cost = f"{number(mean(mean_cost(cells, arm, 'flops') for arm in have) / 1e12)} TFLOP"
        lines.append(
            {
                "study": f"[{study.name}]({study.name}/README.md)",
                "scale": scale,
                "claim": claim.claim,
                "paper": theirs or claim.size or "-",
                "ours": ours,
                "verdict": verdict,
                "cost": cost,
                "outcomes": outcomes,
            }
        )
    return lines


def report_all(*, source: str = "auto", root: Path = STUDIES) -> list[dict[str, Any]]:
    """Write every study's page, and experiments/README.md over all of them.

    Raises:
        ValueError: studies whose page failed, once the others are written; the catalogue leaves them out.
    """
    lines, faults = [], unreadable(root)
    for name in study_names(root):
        try:
            made = report(name, source=source, root=root)
            if made["files"][0].parent != root / name:  # these are a part of its cells; the catalogue is of all
                made = report(name, source="csv", root=root)
            lines += made["entries"]
        except ValueError as error:
            faults.append(f"{name}: {error}")
    write_whole(root / "README.md", catalogue(lines))
    if faults:
        raise ValueError(f"{root / 'README.md'} is without these: " + "; ".join(faults))
    return lines
