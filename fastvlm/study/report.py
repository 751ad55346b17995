"""Make a study's results.csv, plots, README.md and the catalogue; each from what the one before it says."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean

from fastvlm.study.arms import STUDIES, Study, load_study, study_names
from fastvlm.study.cells import (
    Cell,
    Decided,
    check_one_origin,
    decide_claim,
    mean_cost,
    read_csv,
    read_runs,
    write_csv,
)
from fastvlm.study.claims import load_claims, load_figures
from fastvlm.study.plots import make_plots
from fastvlm.study.readme import amount, catalogue, headline, number, readme

ROOT = Path(__file__).resolve().parents[2]


def runs_folder() -> Path:
    return Path(os.environ.get("FASTVLM_RUNS", ROOT / "runs")).resolve()


def gather(study: Study, *, scale: str, source: str, uri: str | None = None) -> tuple[list[Cell], list[str]]:
    """Cells of one scale and what is missing, from `runs`, `csv`, `mlflow`, or `auto`: run directories where there is
    one, else results.csv.

    Raises:
        ValueError: an unknown source.
    """
    file = study.folder / "results.csv"
    if source == "mlflow":
        from fastvlm.study.recorded import read_mlflow

        return read_mlflow(study, scale=scale, uri=uri or f"sqlite:///{runs_folder()}/mlflow.db")
    if source == "csv":
        return read_csv(file, scale=scale), []
    if source not in ("auto", "runs"):
        raise ValueError(f"from={source} is none of auto, runs, csv, mlflow")
    cells, missing = read_runs(study, runs_folder(), scale=scale)
    if source == "auto" and not cells:
        return read_csv(file, scale=scale), []
    return cells, missing


def report(name: str, *, source: str = "auto", uri: str | None = None, root: Path = STUDIES) -> dict:
    """Write results.csv, plots and README.md of a study: into its folder, or below runs/ where the folder's results
    have more cells than are here, so that a part never replaces the whole.

    Returns:
        `verdicts` (a line a claim), `missing` (a line a cell), `remarks`, `files` (the page first), `entries` of the
        catalogue.

    Raises:
        ValueError: an arm, a metric or a figure that does not exist; cells of two origins.
    """
    study = load_study(name, root=root)
    figures = load_figures(study.folder)
    results: dict[str, tuple[list[Cell], list[list[Decided]]]] = {}
    cells_of, missing, claims_of = {}, {}, {}
    for scale in study.arms:
        cells, missing[scale] = gather(study, scale=scale, source=source, uri=uri)
        again = f"python train.py -m experiment={name} scale={scale} runs again those of another version"
        check_one_origin(cells, command=again)
        claims = claims_of[scale] = load_claims(study, scale=scale)
        for claim in claims:
            if lost := [key for key in claim.figures if key not in figures]:
                raise ValueError(f"{study.folder}/claims.yaml: figures names {lost[0]}, which paper.csv has not")
        cells_of[scale] = cells
        results[scale] = (cells, [decide_claim(claim, cells) for claim in claims] if cells else [])
    out, remarks = study.folder, []
    kept = [cell for cells in cells_of.values() for cell in cells]
    before = read_csv(study.folder / "results.csv")
    if len(before) > len(kept):
        out = runs_folder() / "studies" / name
        out.mkdir(parents=True, exist_ok=True)
        remarks = [f"{study.folder} keeps its {len(before)} cells; these {len(kept)} are reported in {out}"]
    ran = {scale: cells for scale, cells in cells_of.items() if cells}
    plots = {s: make_plots(study, cells, claims_of[s], folder=out, scale=s) for s, cells in ran.items()}
    if kept:
        write_csv(out / "results.csv", kept)
    notes = study.folder / "notes.md"
    text = readme(
        study,
        claims=claims_of,
        figures=figures,
        results=results,
        plots=plots,
        notes=notes.read_text(encoding="utf-8") if notes.is_file() else "",
        missing=missing,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    files = [out / "README.md", *(out / plot for names in plots.values() for plot in names)]
    return {
        "verdicts": [f"{d[0].claim.claim} - {headline(d)}" for scale in list(ran)[:1] for d in results[scale][1]],
        "missing": [line for scale in ran for line in missing[scale]],
        "remarks": remarks,
        "files": files + ([out / "results.csv"] if kept else []),
        "entries": entries(study, results, claims_of),
    }


def entries(study: Study, results: dict, claims_of: dict) -> list[dict[str, str]]:
    """The study's lines of the catalogue: one a claim, of the first scale that was run."""
    figures = load_figures(study.folder)
    scale = next((s for s, (cells, _) in results.items() if cells), next(iter(results)))
    cells, decided = results[scale]
    lines = []
    for place, claim in enumerate(claims_of[scale]):
        theirs = "; ".join(f"{k.replace('_', ' ')} {figures[k].value} ({figures[k].status})" for k in claim.figures)
        ours, verdict, cost = "not run", "not run", "-"
        if cells:
            first = decided[place][0]
            verdict = headline(decided[place])
            if first.verdict is None:
                ours = first.why
            else:
                v = first.verdict
                ours = f"{claim.metric.removeprefix('test/')} {amount(first)}"
                if v.needed:
                    verdict += f" (about {v.needed} seeds)"
            spent = [(mean_cost(cells, a, "flops"), mean_cost(cells, a, "seconds")) for a in claim.steps]
            cost = f"{number(mean(f for f, _ in spent) / 1e12)} TFLOP, {mean(s for _, s in spent):.0f} s"
        lines.append(
            {
                "study": f"[{study.name}]({study.name}/README.md)",
                "claim": claim.claim,
                "paper": theirs or claim.size or "-",
                "ours": ours,
                "verdict": verdict,
                "cost": cost,
            }
        )
    return lines


def report_all(*, source: str = "auto", root: Path = STUDIES) -> list[dict[str, str]]:
    """Every study's page, and experiments/README.md over all of them."""
    lines = []
    for name in study_names(root):
        lines += report(name, source=source, root=root)["entries"]
    (root / "README.md").write_text(catalogue(lines), encoding="utf-8")
    return lines
