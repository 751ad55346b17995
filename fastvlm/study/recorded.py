"""Studies in MLflow: a run per study, with its cells nested below it and their stages below those; read cells back."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fastvlm.identity import LIBRARIES, portable_hash
from fastvlm.study.arms import Study, cell_name
from fastvlm.study.cells import ABOUT, COST, NOT_KEPT, Cell, Missing, six_digits, trained, wanted

CELL = "FASTVLM_CELL_RESULT"  # set by the launcher
NOTE = "mlflow.json"


def flat_cost(results: dict) -> dict[str, float]:
    """Return the metrics `cost/...`, summed over a run's stages, and `train/...` of its last stage."""
    stages = list(results.get("cost", {}).values())
    if not stages:
        return {}
    return {f"cost/{key}": sum(stage.get(key, 0.0) for stage in stages) for key in COST} | trained(results)


def begin(tracking, config: DictConfig, *, made: dict, resolved: dict) -> str | None:
    """Start the MLflow run of a pipeline and return its id.

    A study's cell is nested below the study's run; a repeated cell continues its own run.
    """
    tags = {"commit": made["commit"], "code": made["code"], "seed": str(config.seed)}
    tags["config"] = portable_hash(resolved)
    if config.study is None:
        return tracking.pipeline_run(config.name, tags=tags, config=resolved)
    tags |= {"kind": "cell", "study": config.study.name, "scale": config.scale, "arm": config.arm}
    tags["cell"] = config.name
    tags |= {f"hardware.{key}": str(value) for key, value in made["hardware"].items()}
    tags |= {f"library.{key}": str(value) for key, value in made.get("libraries", {}).items()}
    same = {key: tags[key] for key in ("kind", "study", "scale", "arm", "seed", "config")}
    parent = tracking.study_run(config.study.name, scale=config.scale)
    name = f"{config.arm}, seed {config.seed}"
    return tracking.pipeline_run(name, tags=tags, config=resolved, parent=parent, run_id=tracking.find_run(same))


def end_study(tracking, config: DictConfig, status: str) -> None:
    """End the study's MLflow run after a single cell; in a sweep, the sweep ends it."""
    if config.study is not None and CELL not in os.environ:
        tracking.finish(tracking.study_run(config.study.name, scale=config.scale), status)


def record_finished(config: DictConfig, *, results: dict, resolved: dict, run_dir: Path) -> None:
    """Log a cell that was done before, perhaps under another study's name or without a logger, to MLflow."""
    note = run_dir / NOTE
    uri = config.logger.get("uri")
    if uri is None or (note.exists() and json.loads(note.read_text()).get("uri") == uri):
        return
    from fastvlm.build import instantiate

    tracking = instantiate(config.logger, key="logger")
    run_id = begin(tracking, config, made=results["made"], resolved=resolved)
    tracking.log_metrics(run_id, results["metrics"] | flat_cost(results), step=0)
    tracking.finish(run_id)
    end_study(tracking, config, "FINISHED")
    note.write_text(json.dumps({"uri": uri, "run_id": run_id}))


def log_report(tracking, study: Study, *, scale: str, files: Sequence[Path], verdicts: Sequence[str]) -> None:
    """Log a study's table, plots and page as artifacts of its run and its verdicts as description; end the run."""
    run_id = tracking.study_run(study.name, scale=scale)
    for file in files:
        tracking.log_artifact(run_id, file)
    tracking.describe(run_id, "\n".join(f"- {line}" for line in verdicts))
    tracking.finish(run_id)


def read_mlflow(study: Study, *, scale: str, uri: str, experiment: str = "fastvlm") -> tuple[list[Cell], list[Missing]]:
    """Read the finished cells of a study from an MLflow store; return them and the missing cells of the grid.

    Raises:
        ValueError: the store does not exist, or has no such experiment.
    """
    from fastvlm.tracking import absolute_uri, import_mlflow

    import_mlflow()
    from mlflow import MlflowClient

    uri = absolute_uri(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ValueError(f"{uri} does not exist; name the store with uri=sqlite:////path/to/mlflow.db")
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"{uri} holds no experiment {experiment}")
    query = f"tags.kind = 'cell' and tags.study = '{study.name}' and tags.scale = '{scale}' and status = 'FINISHED'"
    runs = client.search_runs([found.experiment_id], query, order_by=["attributes.end_time DESC"], max_results=10_000)
    newest: dict[tuple[str, int], Any] = {}
    for run in runs:
        arm, seed = run.data.tags["arm"], int(run.data.tags["seed"])
        name = cell_name(study.name, scale, arm, seed)
        if (
            arm in study.arms.get(scale, {}) and run.data.tags.get("cell", name) == name
        ):  # nothing but the arm was changed
            newest.setdefault((arm, seed), run)
    cells, missing = [], []
    for arm, seed in wanted(study, newest, scale=scale):
        run = newest.get((arm, seed))
        if run is None:
            missing.append(Missing(arm, seed, f"is not in {uri}"))
        else:
            cells.append(_cell(run.data.tags, run.data.metrics))
    return cells, missing


def _cell(tags: dict[str, str], metrics: dict[str, float]) -> Cell:
    about = {key: tags.get(key, tags.get(f"hardware.{key}", "")) for key in ABOUT}
    about |= {key: tags.get(f"library.{key}", "") for key in LIBRARIES}
    cost = {key: six_digits(metrics.get(f"cost/{key}", 0.0)) for key in COST}
    names = [name for name in sorted(metrics) if name.startswith(("test/", "train/")) and not NOT_KEPT.match(name)]
    kept = {name: six_digits(metrics[name]) for name in names}
    return Cell(about, cost, kept)
