"""One cell of a study or sweep: find its results if it is done, and compute the objective for a sweeper."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fastvlm.config.composition import numbered_job
from fastvlm.config.schema import OBJECTIVE
from fastvlm.files import write_whole
from fastvlm.identity import elsewhere, finished
from fastvlm.study.recorded import CELL, NOTE, record_finished


def finished_cell(config: DictConfig) -> dict | None:
    """Return the results of this cell if it is done with the same configuration, code and kind of hardware, else None.

    Always None outside a sweep or study, where a run evaluates again, and with `overwrite=true`.
    """
    in_sweep = config.study is not None or CELL in os.environ or numbered_job()
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
        copy_run(other, run_dir, resolved=resolved)
        results = finished(run_dir, resolved, ran=ran)
        run_dir = other
    if results is not None:
        print(f"{config.name}: done before ({run_dir})", flush=True)
        if config.study is not None:
            record_finished(config, results=results, resolved=resolved, run_dir=runs / config.name)
    return results


def copy_run(other: Path, run_dir: Path, *, resolved: dict) -> None:
    """Replace what a run directory holds by another run's results, with links and folders seen from here."""
    shutil.rmtree(run_dir, ignore_errors=True)
    # The note names the other's run in MLflow; results.json comes last, as it says that the cell is done.
    apart = shutil.ignore_patterns(NOTE, "stages", "lineage.json", "config.yaml", "results.json")
    shutil.copytree(other, run_dir, ignore=apart)
    (run_dir / "stages").mkdir()
    for link in (other / "stages").glob("*"):
        (run_dir / "stages" / link.name).symlink_to(os.path.relpath(link.resolve(), run_dir / "stages"))
    if (other / "lineage.json").exists():  # the other may be running again
        lineage = json.loads((other / "lineage.json").read_text())
        found = {part: os.path.relpath(other / folder, run_dir) for part, folder in lineage["components"].items()}
        write_whole(run_dir / "lineage.json", json.dumps(lineage | {"components": found}))
    write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)))
    write_whole(run_dir / "results.json", (other / "results.json").read_text())


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
