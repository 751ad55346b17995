"""A study's grid end to end, as processes: cells side by side, one that fails, done cells, MLflow, report."""

import csv
import json
import shutil
import signal
import time

import pytest

from fastvlm.study.arms import load_study, study_names
from fastvlm.study.cells import TIMES
from tests.conftest import ROOT, TINY

QUICK = [option for option in TINY if option not in ("logger=none", "~task")]
SMALL = ["task.limit=1", "task.records=2", "task.first_token=1", "task.text_limit=1", "max_steps=1"]

TOY = f"""# @package _global_
# Does a toy toy?
study:
  name: toy
  micro:
    all: [pipeline=align, task=panel, {", ".join(f"'{o}'" for o in [*QUICK, *SMALL])}]
    arms:
      few: [resampler.num_tokens=4]
      many: []
      broken: [stages.align.batch_size=-1]
hydra:
  sweeper:
    params:
      arm: few,many,broken
      seed: range(1)
"""
CLAIMS = """
- claim: Few tokens are better.
  paper: none
  table: none
  metric: test/answer_nll
  beside: [test/text_perplexity]
  direction: lower
  steps: [few, many]
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    folder = tmp_path / "studies" / "toy"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(TOY)
    (folder / "claims.yaml").write_text(CLAIMS)
    monkeypatch.setenv("FASTVLM_STUDIES", str(folder.parent))
    return folder


def test_a_study_runs_its_grid_and_ends_in_a_report_and_a_failed_cell_stops_no_other(cli, toy, tmp_path):
    first = cli("train.py", "-m", "experiment=toy", "hydra.launcher.parallel=2", check=False)
    assert first.returncode == 2 and "1 of 3 cells failed" in first.stderr, first.stdout + first.stderr
    assert "stages.align.batch_size=-1 must be above 0" in first.stderr
    rows = (toy / "results.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[0].startswith("scale,arm,seed,commit")
    page = (toy / "README.md").read_text()
    assert "**not resolved**: one seed has no spread" in page and "arm=broken seed=0 has not run" in page
    before = (toy / "results.csv").read_bytes()

    # The same command again runs the failed cell alone; nothing else moves, and MLflow has each cell once.
    again = cli("train.py", "-m", "experiment=toy", "arm=few,broken", "hydra.launcher.parallel=1", check=False)
    assert again.stdout.count("done before") == 1 and "1 of 2 cells failed" in again.stderr
    assert (toy / "results.csv").read_bytes() == before

    from mlflow import MlflowClient

    from fastvlm.study.recorded import read_mlflow
    from fastvlm.tracking import import_mlflow

    import_mlflow()
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("fastvlm").experiment_id])
    by_kind = {kind: [r for r in runs if r.data.tags.get("kind") == kind] for kind in ("study", "cell", None)}
    (parent,) = by_kind["study"]
    assert {r.data.tags["arm"] for r in by_kind["cell"]} == {"few", "many"} and len(by_kind["cell"]) == 2
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in by_kind["cell"])
    cells = {r.info.run_id for r in by_kind["cell"]}
    assert {r.data.tags["mlflow.parentRunId"] for r in by_kind[None]} == cells  # stages, below their cells
    assert parent.info.status == "FINISHED"
    assert "not resolved" in parent.data.tags["mlflow.note.content"]
    assert {"README.md", "results.csv", "micro.svg"} <= {f.path for f in client.list_artifacts(parent.info.run_id)}
    study = load_study("toy", root=toy.parent)
    found, missing = read_mlflow(study, scale="micro", uri=uri)
    assert len(found) == 2 and len(missing) == 1
    assert {c.arm: round(c.metrics["test/answer_nll"], 4) for c in found} == {
        row.split(",")[1]: round(float(row.split(",")[rows[0].split(",").index("test/answer_nll")]), 4)
        for row in rows[1:]
    }


@pytest.mark.slow
def test_a_study_run_again_from_nothing_has_the_same_results_but_for_times(cli, toy, tmp_path, monkeypatch):
    command = ["train.py", "-m", "experiment=toy", "arm=few,many", "hydra.launcher.parallel=2", "logger=none"]
    rows = []
    for _ in range(2):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        (toy / "results.csv").unlink(missing_ok=True)
        assert "done before" not in cli(*command).stdout
        with open(toy / "results.csv", newline="") as stream:
            rows.append([{k: v for k, v in row.items() if not TIMES.search(k)} for row in csv.DictReader(stream)])
    assert len(rows[0]) == 2 and rows[0] == rows[1]
    assert {"test/answer_nll", "flops", "train/memory_mib", "config"} <= rows[0][0].keys()
    assert not {"seconds", "test/ttft_ms", "test/ttft_ms/image", "train/step_ms"} & rows[0][0].keys()


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_to_go_on_and_goes_on(commands, cli_place, toy, tmp_path):
    command = [str(ROOT / "train.py"), "-m", "experiment=toy", "arm=few,many", "logger=none"]
    process = commands.start(command, **cli_place())
    deadline = time.time() + 120
    first = tmp_path / "runs" / "studies" / "toy" / "micro" / "few-seed0" / "results.json"
    while not first.exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(120.0)
    _, err = process.output()
    assert process.returncode == 130 and "the same command goes on" in err and "experiment=toy" in err
    done = commands.run(command, timeout=300, **cli_place())
    assert done.returncode == 0 and "done before" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_every_cell_of_a_study_runs_one_step(cli, name, tmp_path):
    # Sizes stay: arms speak of resolutions and tokens that a smaller encoder would not have.
    small = ["logger=none", "task.limit=1", "task.records=2", "task.first_token=1", "task.text_limit=1", "max_steps=1"]
    done = cli("train.py", "-m", f"experiment={name}", "seed=0", "hydra.launcher.parallel=2", *small, timeout=1200)
    assert "its page stays as it is" in done.stdout
    results = list((tmp_path / "runs" / "studies" / name / "micro").glob("*/results.json"))
    assert len(results) == len(load_study(name).arms["micro"])
    for file in results:
        cost = json.loads(file.read_text())["cost"]
        assert all(stage["flops"] > 0 and stage["tokens"] > 0 for stage in cost.values()), file
