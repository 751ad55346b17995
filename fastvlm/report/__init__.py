"""One self-contained page about a run: its results, the course of each stage, and how to reproduce it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastvlm.report.charts import is_number
from fastvlm.report.left_out import left_out_section
from fastvlm.report.page import make_page
from fastvlm.report.results import headline, predictions_section, results_section
from fastvlm.report.stages import (
    StageRecord,
    chain,
    handoff_section,
    provenance_section,
    read_json,
    speed_section,
    stage_section,
    timing_section,
)

__all__ = ["write_report"]


def write_report(
    run_dir: str | Path,
    *,
    title: str,
    stages: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    config: str | Mapping[str, Any] | None = None,
    summary: str = "",
    filename: str = "report.html",
) -> Path:
    """Write `<run_dir>/report.html`; the page names whatever is missing.

    Args:
        run_dir: the run's folder; its `config.yaml`, `results.json` and `provenance.json` supply what is not given.
        title: heading.
        stages: in order, `{"name", "dir"}` and optionally `"seconds"` (of this run) and `"reused"` (found finished).
        results: the content of results.json; its predictions' images are relative to `run_dir`.
        provenance: the content of a provenance.json; None: the run's, or that of the last stage that has one.
        config: resolved configuration, as YAML text or plain dicts.
        summary: a paragraph of plain text below the title.

    Returns:
        The path of the page.
    """
    run_dir = Path(run_dir)
    results = dict(results) if results is not None else read_json(run_dir / "results.json") or {}
    seconds = dict(results.get("seconds") or {})
    records = [
        StageRecord(s["name"], Path(s["dir"]), seconds=s.get("seconds"), reused=bool(s.get("reused"))) for s in stages
    ]
    if provenance is None:
        candidates = [read_json(run_dir / "provenance.json"), *(r.provenance for r in reversed(records))]
        provenance = next((c for c in candidates if c), None)
    if config is None and (run_dir / "config.yaml").exists():
        config = (run_dir / "config.yaml").read_text()
    if isinstance(config, Mapping):
        config = json.dumps(config, indent=2, default=str)

    spent = {r.name: r.seconds for r in records} | seconds
    total = seconds.get("total") or sum(v for k, v in spent.items() if is_number(v) and k != "total") or None
    # Every stage's freezing.json lists the whole model, so one of them is enough to count the parameters.
    rows = next((r.freezing["rows"] for r in reversed(records) if r.freezing and r.freezing.get("rows")), [])
    parameters = sum(row.get("parameters") or 0 for row in rows) or None

    date = time.strftime("%d %B %Y, %H:%M")
    lead = f"<p>{escape(summary)}</p>" if summary else ""
    lead += f'<p class="soft">{escape(run_dir.name)} · {date}</p>'
    lead += headline(results, seconds=total, parameters=parameters)
    sections = [
        ("results", "Results", results_section(results)),
        ("answers", "Answers", predictions_section(results, folder=run_dir)),
        ("stages", "Stages", chain(records) + "".join(stage_section(r) for r in records)),
        ("left-out", "Left out", left_out_section(records)),
        ("speed", "Speed", speed_section(records)),
        ("time", "Time", timing_section(records, seconds)),
        ("handoff", "Handoff", handoff_section(records)),
        ("provenance", "How it was made", provenance_section(dict(provenance) if provenance else None, config)),
    ]
    page = make_page(title, sections, lead=lead, footer=f"Written by fastvlm, {date}.")
    path, part = run_dir / filename, run_dir / f".{filename}.part"
    run_dir.mkdir(parents=True, exist_ok=True)
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path
