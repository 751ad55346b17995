"""Record runs in an MLflow store on SQLite, or not at all.

A pipeline is one MLflow run, with a nested run for every stage. Nothing here uses the network unless the store is a
server. MLflow takes seconds to import, so it is imported when the first run starts.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PARENT_TAG = "mlflow.parentRunId"
TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # makes the dashboard open on runs
MAX_PARAM_CHARS = 6000  # mlflow.utils.validation.MAX_PARAM_VAL_LENGTH


def import_mlflow():
    """Import MLflow without usage telemetry and without its and Alembic's start-up messages."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # Let the asynchronous queue write one transaction per second instead of one per call: a SQLite commit takes 25 ms,
    # and a finished run would wait for hundreds of them.
    os.environ.setdefault("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS", "1")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def absolute_uri(uri: str) -> str:
    """Make the path in `sqlite:///relative.db` absolute; MLflow would resolve it in the folder where it is opened."""
    if not uri.startswith("sqlite:///"):
        return uri
    return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"


def prepare_store(uri: str) -> str:
    """Create the SQLite store or upgrade its schema, and return its absolute address.

    Several processes may call this at once. A lock is needed, because MLflow migrates a fresh database without one, and
    all but one of the processes would fail ("duplicate column name"). An older database is copied before the upgrade.

    Raises:
        ValueError: the file is not a usable MLflow store, or was written by a newer MLflow.
    """
    if not uri.startswith("sqlite:///"):
        return uri
    uri = absolute_uri(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(f"{database}.lock", timeout=300):
        import_mlflow()
        from mlflow.exceptions import MlflowException
        from mlflow.store.db import utils
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
        from sqlalchemy.exc import DatabaseError

        # When the *first* store opened finds tables missing, MLflow runs all migrations from scratch, which fail
        # halfway on an older database. So upgrade it before a store is opened.
        if database.exists() and database.stat().st_size:
            engine = utils.create_sqlalchemy_engine_with_retry(uri)
            try:
                found, latest = utils._get_schema_version(engine), utils._get_latest_schema_revision()
            except DatabaseError:
                raise ValueError(f"{database} is not a SQLite database; choose another logger.uri") from None
            if found is not None and found != latest:
                shutil.copy2(database, f"{database}.before-{latest}")
                try:
                    utils._upgrade_db(engine)
                except Exception as error:
                    reason = str(error).splitlines()[0][:80]
                    raise ValueError(
                        f"{database}: its schema {found} is unknown to this MLflow ({reason}); "
                        "update mlflow, or choose another logger.uri"
                    ) from None
            engine.dispose()
        try:
            # This becomes the artifact root of MLflow's "Default" experiment, otherwise the current folder.
            SqlAlchemyStore(uri, str(artifact_root(uri)))
        except MlflowException as error:
            reason = str(error).splitlines()[0][:100]
            raise ValueError(f"{database} is not a usable MLflow store ({reason}); choose another logger.uri") from None
    return uri


def artifact_root(uri: str) -> Path | None:
    """Return the folder of the artifacts, beside the database; None leaves it to the server."""
    return Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if uri.startswith("sqlite:///") else None


def experiment_id(client, name: str, uri: str) -> str:
    """Return the id of the experiment, creating or restoring it if necessary."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        root = artifact_root(uri)
        try:
            place = (root / name).as_uri() if root else None
            return client.create_experiment(name, artifact_location=place, tags=TRAINING)
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def start_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    parent_id: str | None = None,
    tags: Mapping[str, Any] | None = None,
    run_id: str | None = None,
) -> str:
    """Start a run, or set the run `run_id` back to RUNNING if it still exists; return its id."""
    import_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(absolute_uri(uri))
    tags = {key: str(value) for key, value in (tags or {}).items()}
    if parent_id:
        tags[PARENT_TAG] = parent_id
    if run_id is not None:
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                client.update_run(run_id, status="RUNNING")
                for key, value in tags.items():
                    client.set_tag(run_id, key, value)
                return run_id
        except MlflowException:
            pass  # the store was deleted or moved; start a new run
    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL", **tags}
    run = client.create_run(experiment_id(client, experiment, absolute_uri(uri)), run_name=name, tags=tags)
    return run.info.run_id


def find_run(uri: str, experiment: str, *, tags: Mapping[str, Any]) -> str | None:
    """Return the id of the experiment's latest run with all these tags, or None."""
    import_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(absolute_uri(uri))
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = client.search_runs([found.experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1)
    return runs[0].info.run_id if runs else None


def flatten(config: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: `{"a": {"b": 1}}` -> `{"a/b": 1}`; lists are kept."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, prefix=name)
        else:
            flat[name] = value
    return flat


def log_params(uri: str, run_id: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Log the flattened configuration; return and tag the values that differ from those the run already has.

    MLflow's params are write-once: a second value raises. A resumed run may legitimately differ, for example in its
    number of workers, so the first value stays and the tag `params.changed` lists the changes.
    """
    import_mlflow()
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient(absolute_uri(uri))
    known = client.get_run(run_id).data.params
    wanted = {key: str(value)[:MAX_PARAM_CHARS] for key, value in flatten(config).items()}
    client.log_batch(run_id, params=[Param(key, value) for key, value in wanted.items() if key not in known])
    changed = {key: value for key, value in wanted.items() if known.get(key, value) != value}
    if changed:
        text = "; ".join(f"{key}: {known[key]} -> {value}" for key, value in sorted(changed.items()))
        client.set_tag(run_id, "params.changed", text[:5000])
    return changed


def make_logger(uri: str, experiment: str, *, run_id: str):
    """Create Lightning's MLFlowLogger for an existing run: asynchronous, without model copies.

    Changed parameters do not raise (`log_params`). It also has `set_tags(dict)` and `log_file(path, folder)`, which the
    callbacks use.
    """
    import_mlflow()
    from lightning.pytorch.loggers import MLFlowLogger
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    class StageLogger(MLFlowLogger):
        @rank_zero_only
        def log_hyperparams(self, params: Any) -> None:
            log_params(self._tracking_uri, self.run_id, params if isinstance(params, Mapping) else vars(params))

        @rank_zero_only
        def set_tags(self, tags: Mapping[str, Any]) -> None:
            for key, value in tags.items():
                self.experiment.set_tag(self.run_id, key, str(value)[:5000])

        @rank_zero_only
        def log_file(self, path: str | Path, folder: str | None = None) -> None:
            self.experiment.log_artifact(self.run_id, str(path), folder)

    uri = absolute_uri(uri)
    root = artifact_root(uri)
    return StageLogger(
        experiment_name=experiment,
        tracking_uri=uri,
        artifact_location=(root / experiment).as_uri() if root else None,
        run_id=run_id,
        synchronous=False,
        log_model=False,
    )


def finish(uri: str, run_id: str, status: str = "FINISHED") -> None:
    """Flush the queue, then end the run as FINISHED, FAILED or KILLED."""
    import_mlflow()
    from mlflow import MlflowClient

    # MLflow caches stores by address, so this flushes the queue of every logger on the same store.
    MlflowClient(absolute_uri(uri)).set_terminated(run_id, status)


class MLflowTracking:
    """Records pipelines and stages in one MLflow store.

    Args:
        uri: `sqlite:///path/to.db` (made absolute; artifacts are stored beside it) or the address of a server.
        experiment: name of the MLflow experiment of all runs.
    """

    def __init__(self, uri: str, *, experiment: str):
        self.uri, self.experiment = absolute_uri(uri), experiment
        self._ready = False

    def prepare(self) -> None:
        """Create or upgrade the store once. The first run does this; call it before a sweep starts its jobs."""
        if not self._ready:
            prepare_store(self.uri)
            self._ready = True

    def pipeline_run(
        self,
        name: str,
        tags: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        parent: str | None = None,
    ) -> str:
        """Start the run of a pipeline, or continue the run `run_id`; `parent` is its study's run."""
        self.prepare()
        run_id = start_run(self.uri, self.experiment, name, parent_id=parent, tags=tags, run_id=run_id)
        if config:
            log_params(self.uri, run_id, config)
        return run_id

    def study_run(self, study: str, *, scale: str) -> str:
        """Find, or start, the run under which a study's cells are nested; set it to RUNNING and return its id."""
        from filelock import FileLock

        self.prepare()
        tags = {"kind": "study", "study": study, "scale": scale}
        root = artifact_root(self.uri)
        with FileLock(f"{root}.lock", timeout=300) if root else nullcontext():
            found = self.find_run(tags)
            tags = tags if found is None else {}  # an existing run has them
            return start_run(self.uri, self.experiment, f"{study} ({scale})", tags=tags, run_id=found)

    def stage_logger(
        self,
        stage_name: str,
        parent: str | None = None,
        tags: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
    ):
        """Return a Lightning logger for a run nested under `parent`.

        With `run_id` an interrupted stage continues in its own run, which is moved to the new parent.
        """
        self.prepare()
        run_id = start_run(self.uri, self.experiment, stage_name, parent_id=parent, tags=tags, run_id=run_id)
        return make_logger(self.uri, self.experiment, run_id=run_id)

    def find_run(self, tags: Mapping[str, Any]) -> str | None:
        """Return the id of the latest run with these tags, such as an interrupted stage of the same hash, or None."""
        self.prepare()
        return find_run(self.uri, self.experiment, tags=tags)

    def log_artifact(self, run_id: str, path: str | Path) -> None:
        import_mlflow()
        from mlflow import MlflowClient

        MlflowClient(self.uri).log_artifact(run_id, str(path))

    def describe(self, run_id: str, text: str) -> None:
        """Set the run's description (Markdown) in the dashboard."""
        import_mlflow()
        from mlflow import MlflowClient
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

        MlflowClient(self.uri).set_tag(run_id, MLFLOW_RUN_NOTE, text[:5000])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        import_mlflow()
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        MlflowClient(self.uri).log_batch(run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        finish(self.uri, run_id, status)


class NoTracking:
    """Stand-in for `MLflowTracking` that records nothing; metrics.jsonl and the report are still written."""

    def prepare(self) -> None:
        pass

    def pipeline_run(self, name, tags=None, config=None, *, run_id=None, parent=None) -> None:
        return None

    def study_run(self, study, *, scale) -> None:
        return None

    def stage_logger(self, stage_name, parent=None, tags=None, *, run_id=None) -> None:
        return None

    def find_run(self, tags) -> None:
        return None

    def log_artifact(self, run_id, path) -> None:
        pass

    def describe(self, run_id, text) -> None:
        pass

    def log_metrics(self, run_id, metrics, step=0) -> None:
        pass

    def finish(self, run_id, status="FINISHED") -> None:
        pass
