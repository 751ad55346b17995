"""One cell of a study or sweep: find its results if it is done, and compute the objective for a sweeper."""

from __future__ import annotations

import difflib
import os
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fastvlm.config.schema import OBJECTIVE
from fastvlm.identity import elsewhere, finished
from fastvlm.study.recorded import CELL, NOTE, record_finished


def finished_cell(config: DictConfig) -> dict | None:
    """Return the results of this cell if it is done with the same configuration, code and kind of hardware, else None.

    Always None outside a sweep or study, where a run evaluates again, and with `overwrite=true`.
    """
    in_sweep = config.study is not None or CELL in os.environ
    if not in_sweep or config.overwrite:
        return None
    from fastvlm.build import instantiate, settle_views

    if config.get("vlm"):  # the keys that a pretrained model fills in are part of the configuration
        settle_views(config)
    runs = Path(config.paths.runs).resolve()
    run_dir = runs / config.name
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    ran: dict = instantiate(config.hardware, key="hardware").decides()
    results = finished(run_dir, resolved, ran=ran)
    if results is None and (other := elsewhere(runs, resolved, ran=ran)) is not None:
        # The same cell under another study's name, most often a baseline: reuse its results.
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        if not run_dir.exists():
            shutil.copytree(other, run_dir, symlinks=True, ignore=shutil.ignore_patterns(NOTE))  # names the other run
        else:
            for name in ("results.json", "config.yaml", "lineage.json"):
                shutil.copyfile(other / name, run_dir / name)
        results = finished(run_dir, resolved, ran=ran)
        run_dir = other
    if results is not None:
        print(f"{config.name}: done before ({run_dir})", flush=True)
        if config.study is not None:
            record_finished(config, results=results, resolved=resolved, run_dir=runs / config.name)
    return results


def objective(results: dict, *, names: list[str]) -> float | list[float] | None:
    """Return the named metric for the sweeper, or a list of several; None for a run without metrics.

    The default metric is that of the embedded tasks; for a task without it, such as a public benchmark, None too.

    Raises:
        ValueError: the run has metrics, but not this one.
    """
    metrics = results["metrics"]
    if not metrics or (names == [OBJECTIVE] and OBJECTIVE not in metrics):
        return None
    for name in names:
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"objective: the task yields no {name}{hint}")
    values = [float(metrics[name]) for name in names]
    return values[0] if len(values) == 1 else values
