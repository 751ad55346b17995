import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm.tracking import MLflowTracking, NoTracking, absolute_uri, flatten, prepare_store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Two processes open the same fresh store at once; their outputs, and the tracking of that store."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    code = (
        "import sys; from fastvlm.tracking import MLflowTracking\n"
        f"tracking = MLflowTracking({uri!r}, experiment='study')\n"
        "run = tracking.pipeline_run('job ' + sys.argv[1], tags={'job': sys.argv[1]})\n"
        "assert 'torch' not in sys.modules, 'starting a run need not load torch'\nprint(run)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], env=env, cwd=folder, stdout=-1, stderr=-1, text=True)
        for i in range(2)
    ]
    outputs = [job.communicate(timeout=120) + (job.returncode,) for job in jobs]
    return outputs, MLflowTracking(uri, experiment="study")


def client(tracking):
    from mlflow import MlflowClient

    return MlflowClient(tracking.uri)


def test_processes_that_prepare_a_fresh_store_at_once_all_succeed_in_silence(started):
    outputs, tracking = started
    assert [code for _, _, code in outputs] == [0, 0], outputs
    assert [err for _, err, _ in outputs] == ["", ""]
    runs = {out.strip() for out, _, _ in outputs}
    assert len(runs) == 2 and all(len(run) == 32 for run in runs)
    assert tracking.find_run({"job": "1"}) == outputs[1][0].strip()
    assert tracking.find_run({"job": "none"}) is None


def test_stages_are_nested_below_the_pipeline_and_every_queued_metric_is_written(started):
    tracking = started[1]
    pipeline = tracking.pipeline_run("three stages", {"kind": "pipeline"}, {"a": {"b": 1}})
    logger = tracking.stage_logger("align", pipeline, {"stage.hash": "abc"})
    for step in range(200):
        logger.log_metrics({"train/loss": 1 / (step + 1), "train/loss/captions": 2.0}, step=step)
    logger.finalize("success")
    tracking.log_metrics(pipeline, {"accuracy": 0.5}, 3)
    tracking.finish(pipeline, "FINISHED")
    stage = client(tracking).get_run(logger.run_id)
    assert stage.data.tags["mlflow.parentRunId"] == pipeline and stage.info.run_name == "align"
    assert len(client(tracking).get_metric_history(logger.run_id, "train/loss")) == 200
    assert stage.info.status == "FINISHED" and client(tracking).get_run(pipeline).info.status == "FINISHED"
    assert client(tracking).get_run(pipeline).data.metrics == {"accuracy": 0.5}


def test_an_interrupted_run_continues_and_changed_parameters_are_recorded_not_raised(started):
    tracking = started[1]
    pipeline = tracking.pipeline_run("again", config={"workers": 2, "seed": 0})
    logger = tracking.stage_logger("align", pipeline)
    logger.log_hyperparams({"x": {"y": 1}})
    logger.log_metrics({"train/loss": 1.0}, step=1)
    tracking.finish(logger.run_id, "KILLED")
    tracking.finish(pipeline, "KILLED")

    assert tracking.pipeline_run("again", config={"workers": 8, "seed": 0, "new": 1}, run_id=pipeline) == pipeline
    resumed = tracking.stage_logger("align", pipeline, run_id=logger.run_id)
    assert resumed.run_id == logger.run_id
    resumed.log_hyperparams({"x": {"y": 2}})
    resumed.log_metrics({"train/loss": 0.5}, step=2)
    run = client(tracking).get_run(pipeline)
    assert run.info.status == "RUNNING" and run.data.params == {"workers": "2", "seed": "0", "new": "1"}
    assert run.data.tags["params.changed"] == "workers: 2 -> 8"
    tracking.finish(resumed.run_id)
    assert len(client(tracking).get_metric_history(logger.run_id, "train/loss")) == 2
    assert client(tracking).get_run(logger.run_id).data.tags["params.changed"] == "x/y: 1 -> 2"
    assert tracking.stage_logger("align", pipeline, run_id="0" * 32).run_id != logger.run_id


def test_artifacts_stand_beside_the_database_and_runs_are_described(started, tmp_path):
    tracking = started[1]
    run = tracking.pipeline_run("artifacts")
    (tmp_path / "report.html").write_text("page")
    tracking.log_artifact(run, tmp_path / "report.html")
    database = Path(tracking.uri.removeprefix("sqlite:///"))
    assert next((database.parent / "mlartifacts" / "study").rglob("report.html")).read_text() == "page"
    tracking.describe(run, "what came out")
    assert client(tracking).get_run(run).data.tags["mlflow.note.content"] == "what came out"
    experiment = client(tracking).get_experiment_by_name("study")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    default = client(tracking).get_experiment("0")
    assert Path(default.artifact_location).is_relative_to(database.parent)


def test_a_study_gone_on_with_is_running_again_in_its_own_run(started):
    tracking = started[1]
    run = tracking.study_run("llava_align", scale="micro")
    tracking.finish(run, "KILLED")
    assert client(tracking).get_run(run).info.status == "KILLED"
    assert tracking.study_run("llava_align", scale="micro") == run
    assert client(tracking).get_run(run).info.status == "RUNNING"
    assert tracking.study_run("llava_align", scale="paper") != run


def test_a_file_that_is_no_store_is_refused_in_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to look at " * 40)
    with pytest.raises(ValueError, match="choose another logger.uri") as error:
        prepare_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert "\n" not in str(error.value)


def test_addresses_become_absolute_and_servers_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert absolute_uri("http://localhost:5000") == "http://localhost:5000"


def test_no_tracking_has_the_same_interface():
    public = [name for name in vars(MLflowTracking) if not name.startswith("_")]
    assert public == [name for name in vars(NoTracking) if not name.startswith("_")]
    tracking = NoTracking()
    run = tracking.pipeline_run("name", {"a": 1}, {"b": 2})
    assert run is None and tracking.stage_logger("align", run, {}) is None
    tracking.log_artifact(run, "x")
    tracking.log_metrics(run, {}, 1)
    tracking.finish(run, "FINISHED")


def test_flatten_keeps_lists_and_empty_groups():
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": None}) == {"a/b": [1, 2], "a/c": {}, "d": None}
