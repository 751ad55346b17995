"""Hooks of a study's sweep, called by the launcher: before its first cell, after each cell, and after its last."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from fastvlm.identity import read_results
from fastvlm.study.arms import Study, cell_name, expand, is_silent, key_of, load_study, value_of
from fastvlm.study.cells import planned, trained
from fastvlm.study.claims import all_claims, figures_of, load_claims
from fastvlm.study.grid import FILE, Sweep, began, cells_since, note, stages_found
from fastvlm.study.recorded import log_report
from fastvlm.study.report import report, runs_folder, say


def prepare(config: DictConfig, jobs: list[list[str]]) -> None:
    """Check all that the page after the grid needs, and create the MLflow store and the study's run.

    Cells then find the store there, which they open in parallel.

    Raises:
        ValueError: an arm, the grid, a claim, a metric or a figure of the paper is wrong; raised before anything runs.
    """
    study = load_study(config.study.name)
    for arm in dict.fromkeys(value_of(job, "arm") for job in jobs):
        if arm is None:
            raise ValueError(f"experiment={study.name}: its grid has no arm; add arm=... to hydra.sweeper.params")
        study.overrides(arm, config.scale)
    planned(study, scale=config.scale)
    figures_of(study, all_claims(study))
    if not config.dry_run:
        tracking(config).study_run(study.name, scale=config.scale)


def check_yield(config: DictConfig, job: Sequence[str]) -> None:
    """Check after a cell that its task yielded the metrics that decide the claims about its arm.

    Otherwise the lack would be noticed only after the whole grid. A grid with other settings than the study's own
    decides nothing and is not checked.

    Raises:
        ValueError: names claim, arm and metric, and the nearest metric.
    """
    name, arm = value_of(expand(list(job)), "name"), value_of(list(job), "arm")
    results = read_results(Path(config.paths.runs) / str(name))
    if results is None or arm is None or changed(job):
        return
    have = results["metrics"] | trained(results)
    for claim in load_claims(load_study(config.study.name), scale=config.scale):
        if arm in claim.arms and claim.metric not in have:
            near = difflib.get_close_matches(claim.metric, have, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"the claim '{claim.claim}' is decided on {claim.metric}, which the task of arm={arm} did not "
                f"yield{hint}"
            )


def changed(changes: Sequence[str]) -> list[str]:
    """Return the overridden keys that make a grid's cells other than the study's own."""
    return sorted({key_of(o) for o in changes if not is_silent(o)})


def time_grid(
    config: DictConfig, changes: Sequence[str], *, begun: float, at_once: int | None, jobs: Sequence[list[str]] = ()
) -> None:
    """Print how long a sweep took and what it ran; record it for the page if the grid is the study's own.

    Args:
        changes: the overrides of the sweep's cells.
        begun: when it started, seconds since the epoch.
        at_once: cells that run in parallel; None: unknown.
        jobs: the overrides of each cell; none: unknown, so all cells that ran since count.
    """
    study, runs = load_study(config.study.name), Path(config.paths.runs).resolve()
    minutes, width = (time.time() - begun) / 60, f", {at_once} at once" if at_once else ""
    said = f"\n{study.name}: {minutes:.1f} minutes by the clock"
    if changed(changes):
        print(f"{said}{width}", flush=True)
        return
    at = {cell_of(study, config.scale, job) for job in jobs}
    names = cells_since(study, runs, scale=config.scale, begun=begun, of=at)
    stages = stages_found(study, runs, scale=config.scale, begun=begun, cells=names)
    note(runs / "studies" / study.name / FILE, Sweep(config.scale, round(minutes, 2), at_once, names, stages))
    found = sum(began(runs / name) is not None for name in at) - len(names) if at else 0
    before = f", {found} found done" if found > 0 else ""
    print(f"{said}, {len(names)} cells run{width}{before}", flush=True)


def cell_of(study: Study, scale: str, job: list[str]) -> str:
    return cell_name(study.name, scale, value_of(job, "arm"), value_of(job, "seed") or 0)


def conclude(config: DictConfig, changes: Sequence[str]) -> None:
    """Write table, plots, page and verdicts of the study, here and to MLflow.

    A grid with other settings than the study's own leaves its page as it is. The study's run in MLflow ends, as FAILED
    if there is no new page.

    Args:
        changes: the overrides of the sweep's cells.

    Raises:
        ValueError: from `report`.
    """
    study = load_study(config.study.name)
    if keys := changed(changes):
        print(f"\n{study.name}: run with {', '.join(keys)} changed, so its page stays as it is", flush=True)
        end(config, "FINISHED")
        return
    if Path(config.paths.runs).resolve() != runs_folder():
        print(f"\n{study.name}: for its report set FASTVLM_RUNS={config.paths.runs}", flush=True)
        end(config, "FINISHED")
        return
    try:
        made = report(study.name)
    except ValueError:
        end(config, "FAILED")
        raise
    print("\n".join(["", study.name, *(f"  {line}" for line in (*say(made), made["files"][0]))]), flush=True)
    verdicts = made["verdicts"].get(config.scale, [])
    log_report(tracking(config), study, scale=config.scale, files=made["files"], verdicts=verdicts)


def end(config: DictConfig, status: str) -> None:
    """End the study's own run in MLflow, if there is one."""
    store = tracking(config)
    run_id = store.study_run(config.study.name, scale=config.scale)
    if run_id is not None:
        store.finish(run_id, status)


def tracking(config: DictConfig):
    from fastvlm.build import instantiate

    return instantiate(config.logger, key="logger")
