"""A study's grid end to end, as processes: cells side by side, one that fails, done cells, MLflow, report."""

import csv
import json
import shutil
import signal
import time

import pytest

from fastvlm.hardware import Hardware
from fastvlm.identity import libraries
from fastvlm.study.arms import load_study, study_names
from fastvlm.study.cells import TIMES, read_csv
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
    assert "toy: " in first.stdout and "minutes by the clock, 2 cells run, 2 at once\n" in first.stdout
    (sweep,) = json.loads((toy / "grid.json").read_text())
    assert sweep["cells"] == ["few-seed0", "many-seed0"] and "2 cells, 2 at once." in page
    before = (toy / "results.csv").read_bytes()
    # Weights of two versions or devices never stand in one study.
    stages = (tmp_path / "runs" / "stages").glob("align-*/handoff/manifest.json")
    made_with = [json.loads(manifest.read_text())["identity"]["made_with"] for manifest in stages]
    assert made_with and all(one == [libraries(), Hardware().decides()["accelerator"]] for one in made_with)

    # The same command again runs the failed cell alone; nothing else moves, and MLflow has each cell once.
    again = cli("train.py", "-m", "experiment=toy", "arm=few,broken", "hydra.launcher.parallel=1", check=False)
    assert again.stdout.count("done before") == 1 and "1 of 2 cells failed" in again.stderr
    assert "minutes by the clock, 0 cells run, 1 at once, 1 found done" in again.stdout
    assert (toy / "results.csv").read_bytes() == before

    from fastvlm.study.recorded import read_mlflow

    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    by_kind = mlflow_runs(uri)
    (parent,) = by_kind["study"]
    assert {r.data.tags["arm"] for r in by_kind["cell"]} == {"few", "many"} and len(by_kind["cell"]) == 2
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in by_kind["cell"])
    cells = {r.info.run_id for r in by_kind["cell"]}
    assert {r.data.tags["mlflow.parentRunId"] for r in by_kind[None]} == cells  # stages, below their cells
    assert parent.info.status == "FINISHED"
    table = {row["arm"]: row for row in csv.DictReader(rows)}
    for run in by_kind["cell"]:
        tags, row = run.data.tags, table[run.data.tags["arm"]]
        assert [tags[key] for key in ("commit", "code", "config", "seed")] == [
            row[key] for key in ("commit", "code", "config", "seed")
        ]
        assert tags["library.torch"] == row["torch"] and tags["cell"] == f"studies/toy/micro/{row['arm']}-seed0"
    assert "not resolved (one seed has no spread" in parent.data.tags["mlflow.note.content"]
    from mlflow import MlflowClient

    artifacts = {file.path for file in MlflowClient(uri).list_artifacts(parent.info.run_id)}
    assert {"README.md", "results.csv", "grid.json", "micro.svg"} <= artifacts
    study = load_study("toy", root=toy.parent)
    found, missing = read_mlflow(study, scale="micro", uri=uri)
    assert len(found) == 2 and len(missing) == 1
    assert found == read_csv(toy / "results.csv")


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


def mlflow_runs(uri: str) -> dict[str, list]:
    """Kind -> runs of the store: study, cell, or None for stages."""
    from fastvlm.tracking import import_mlflow

    import_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("fastvlm").experiment_id])
    return {kind: [r for r in runs if r.data.tags.get("kind") == kind] for kind in ("study", "cell", None)}


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_to_go_on_and_goes_on_in_the_same_runs(commands, cli_place, toy, tmp_path):
    # Many steps of one row: long enough to be met in the middle of a stage.
    long = ["max_steps=400", "stages.align.batch_size=1", "checkpoint_every=5"]
    command = [str(ROOT / "train.py"), "-m", "experiment=toy", "arm=few,many", "hydra.launcher.parallel=1", *long]
    process = commands.start(command, **cli_place())
    deadline = time.time() + 180
    while not list((tmp_path / "runs" / "stages").glob("*/step=*.ckpt")) and time.time() < deadline:
        assert process.poll() is None, process.output()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(120.0)
    _, err = process.output()
    assert process.returncode == 130 and "the same command goes on" in err and "experiment=toy" in err, err
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    killed = mlflow_runs(uri)
    assert [run.info.status for run in killed["study"]] == ["KILLED"]
    assert [run.info.status for run in killed["cell"]] == ["KILLED"]
    command[-3:] = [*long[1:], "max_steps=400"]  # the same, in another order
    done = commands.run(command, timeout=400, **cli_place())
    assert done.returncode == 0, done.stdout + done.stderr
    after = mlflow_runs(uri)
    assert {r.info.status for kind in after.values() for r in kind} == {"FINISHED"}
    assert len(after["study"]) == 1 and len(after["cell"]) == 2
    assert killed["cell"][0].info.run_id in {run.info.run_id for run in after["cell"]}
    assert killed[None][0].info.run_id in {run.info.run_id for run in after[None]}


# As a shell script starts what it ends with &.
IN_BACKGROUND = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("met", "number", "start"),
    [
        pytest.param("importing", signal.SIGINT, [], marks=pytest.mark.slow),
        ("training", signal.SIGINT, []),
        ("training", signal.SIGTERM, ["-c", IN_BACKGROUND]),
    ],
    ids=["importing", "training", "kill-in-background"],
)
def test_an_interrupt_ends_both_cells_of_a_grid_side_by_side(commands, cli_place, toy, tmp_path, met, number, start):
    long = ["max_steps=100000", "stages.align.batch_size=1", "checkpoint_every=5"]
    command = [str(ROOT / "train.py"), "-m", "experiment=toy", "arm=few,many", "hydra.launcher.parallel=2", *long]
    process = commands.start([*start, *command], **cli_place())
    stages = tmp_path / "runs" / "stages"
    there = {
        "importing": lambda: {"#0", "#1"} <= set(process.output()[0].split()),
        "training": lambda: len({path.parent for path in stages.glob("*/step=*.ckpt")}) == 2,
    }
    deadline = time.time() + 100
    while not there[met]() and time.time() < deadline:
        assert process.poll() is None, process.output()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(40.0) == 130, process.output()
    assert "the same command goes on" in process.output()[1]
    runs = mlflow_runs(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert [run.info.status for run in runs["study"]] == ["KILLED"]
    assert [run.info.status for run in runs["cell"]] == ["KILLED"] * (2 if met == "training" else 0)
    assert not list((tmp_path / "runs").rglob("results.json"))


def test_an_unknown_arm_in_a_sweep_is_told_before_anything_runs(cli, toy, tmp_path):
    done = cli("train.py", "-m", "experiment=toy", "arm=few,mny", "logger=none", check=False)
    assert done.returncode == 2 and "arm=mny: experiment=toy has no such arm" in done.stderr
    assert "did you mean arm=many?" in done.stderr and not (tmp_path / "runs" / "studies").exists()


@pytest.mark.slow
def test_a_metric_that_the_task_does_not_yield_ends_the_grid_after_its_first_cell(cli, toy, tmp_path):
    file = toy / "claims.yaml"
    file.write_text(CLAIMS.replace("metric: test/answer_nll", "metric: test/speed/ttft_ms"))
    command = ["train.py", "-m", "experiment=toy", "arm=few,many", "hydra.launcher.parallel=1"]
    done = cli(*command, check=False)
    assert done.returncode == 2 and "which the task of arm=few did not yield" in done.stderr
    assert len(list((tmp_path / "runs" / "studies").rglob("results.json"))) == 1
    assert [run.info.status for run in mlflow_runs(f"sqlite:///{tmp_path}/runs/mlflow.db")["study"]] == ["FAILED"]
    file.write_text(CLAIMS.replace("metric: test/answer_nll", "metric: test/answer_nl"))
    done = cli(*command, check=False)
    assert done.returncode == 2 and "did you mean test/answer_nll?" in done.stderr and "\n#" not in done.stdout


@pytest.mark.slow
def test_a_cell_of_a_sweep_may_have_several_ranks(cli, toy, tmp_path):
    two = ["hardware.devices=2", "hydra.launcher.parallel=1", "logger=none"]
    cli("train.py", "-m", "experiment=toy", "arm=few,many", *two, timeout=400)
    results = list((tmp_path / "runs" / "studies" / "toy").rglob("results.json"))
    assert len(results) == 2 and {json.loads(f.read_text())["made"]["hardware"]["ranks"] for f in results} == {2}
    assert len((toy / "results.csv").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]]
)
def test_a_study_under_another_launcher_ends_in_its_page_too(cli, toy, tmp_path, launcher):
    for name in ("joblib", "submitit"):
        pytest.importorskip(f"hydra_plugins.hydra_{name}_launcher")
    done = cli("train.py", "-m", "experiment=toy", "arm=few,many", *launcher, timeout=400)
    assert "Few tokens are better. - not resolved" in done.stdout and "README.md" in done.stdout
    assert len((toy / "results.csv").read_text().splitlines()) == 3
    runs = mlflow_runs(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert [run.info.status for run in runs["study"]] == ["FINISHED"] and len(runs["cell"]) == 2
    done = cli("train.py", "-m", "experiment=toy", "arm=few,mny", *launcher, check=False)
    assert done.returncode == 2 and "did you mean arm=many?" in done.stderr
    done = cli("train.py", "-m", "experiment=toy", "arm=few,broken", *launcher, check=False, timeout=400)
    assert done.returncode and "stages.align.batch_size=-1 must be above 0" in done.stdout + done.stderr
    runs = mlflow_runs(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert [run.info.status for run in runs["study"]] == ["FAILED"]


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_every_cell_of_a_study_runs_one_step(cli, name, tmp_path):
    # Sizes stay: arms speak of resolutions and tokens that a smaller encoder would not have.
    arms = load_study(name).arms["micro"]
    small = ["logger=none", "task.limit=1", "task.records=2", "task.first_token=1", "task.text_limit=1", "max_steps=1"]
    if "task=few_shot" in next(iter(arms.values())):  # the tests' data have few other images with a type's questions
        small += ["task.limit=24", "task.shots=[0,2]"]
    done = cli("train.py", "-m", f"experiment={name}", "seed=0", "hydra.launcher.parallel=2", *small, timeout=1200)
    assert "its page stays as it is" in done.stdout
    results = list((tmp_path / "runs" / "studies" / name / "micro").glob("*/results.json"))
    assert len(results) == len(arms)
    for file in results:
        cost = json.loads(file.read_text())["cost"]
        assert all(stage["flops"] > 0 and stage["tokens"] > 0 for stage in cost.values()), file
