"""Sweeping beyond grids: a search that goes on, and launchers of other hands."""

import json
import math
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf, open_dict

from fastvlm.config import compose
from hydra_plugins.fastvlm_optuna_sweeper.optuna_sweeper import OptunaSweeper
from tests.conftest import TINY

optuna = pytest.importorskip("optuna")
SMALL = [o for o in TINY if o != "~task"] + ["pipeline=align", "task=panel", "task.limit=1", "task.records=2"]
SMALL += ["task.first_token=1", "task.text_limit=1", "max_steps=1"]
SEARCH = [
    *("-m", *SMALL, "hydra/sweeper=optuna", "objective=[test/answer_nll,test/ttft_ms]"),
    *("hydra.sweeper.directions=[minimize,minimize]", "resampler.num_tokens=choice(4,16)"),
    "stages.align.trainable.projector=tag(log,interval(1e-4,1e-2))",
]


@pytest.mark.slow
def test_a_search_of_two_objectives_ends_in_its_front_and_the_same_command_goes_on(cli, tmp_path):
    first = cli("train.py", *SEARCH, "hydra.sweeper.n_trials=2")
    assert first.stdout.count("\n#") == 2 and "best of 2 trials" in first.stdout
    (file,) = (tmp_path / "runs" / "searches").glob("*.json")
    best = json.loads(file.read_text())["best"]
    assert best and all(set(row["values"]) == {"test/answer_nll", "test/ttft_ms"} for row in best)
    assert all(row["params"]["resampler.num_tokens"] in (4, 16) for row in best)
    again = cli("train.py", *SEARCH, "hydra.sweeper.n_trials=2")
    assert again.stdout.count("\n#") == 0 and "best of 2 trials" in again.stdout
    more = cli("train.py", *SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweeper.batch=2")
    assert more.stdout.count("\n#") == 1 and "best of 3 trials" in more.stdout


def make_sweeper(arguments, *, edited=(), **options):
    """A sweeper and what it makes of these arguments: (fixed overrides, ranges); `edited` changes conf/ itself."""

    def load_sweep_config(_, overrides):
        config = compose("train", [*overrides, *edited])
        with open_dict(config):
            config.hydra = {}
        return config

    sweeper = OptunaSweeper(**options)
    loader = SimpleNamespace(load_sweep_config=load_sweep_config, get_sources=lambda: [])
    sweeper.hydra_context = SimpleNamespace(config_loader=loader)
    sweeper.config = OmegaConf.create({"objective": ["a"]})
    return sweeper, *sweeper.ranges(arguments, optuna.distributions)


@pytest.mark.parametrize(
    ("values", "last"), [("range(0,10,3)", 9), ("range(1,5)", 4), ("range(0,1,0.25)", 0.75), ("range(0,1,0.3)", 0.9)]
)
def test_a_range_ends_with_its_last_value_before_the_stop(values, last):
    _, _, ranges = make_sweeper([f"stages.instruct.steps={values}"])
    assert ranges["stages.instruct.steps"].high == pytest.approx(last)


def test_a_search_with_other_settings_or_ranges_is_another_search():
    def name(*arguments, **options):
        sweeper, fixed, ranges = make_sweeper([*arguments], **options)
        return sweeper.settings(fixed, ranges)

    tokens = "resampler.num_tokens=choice(4,16)"
    assert name(tokens) == name(tokens, "logger=none") == name(tokens, n_trials=3, sampler="random")
    others = [[tokens, "seed=1"], [tokens, "stages.dense.steps=9"], ["resampler.num_tokens=choice(4,8,16)"]]
    others = {name(tokens), name(tokens, directions=["minimize"]), *(name(*other) for other in others)}
    assert len(others) == 5 and name(tokens, edited=["llm.hidden_size=96"]) not in others


@pytest.mark.parametrize(
    ("status", "value"), [(JobStatus.FAILED, ValueError("it failed")), (JobStatus.COMPLETED, math.nan)]
)
def test_a_search_whose_trials_all_fail_ends_whatever_was_interrupted_before(status, value):
    cell = JobReturn(status=status, _return_value=value)
    sweeper, _, ranges = make_sweeper(["resampler.num_tokens=choice(4,16)"], n_trials=2)
    study = optuna.create_study(direction="maximize")
    for _ in range(5):
        study.tell(study.ask(ranges), state=optuna.trial.TrialState.FAIL)
    for _ in range(2):
        sweeper.tell(study, study.ask(ranges), cell, optuna)
    with pytest.raises(ValueError, match="3 trials have failed or have a metric that is NaN; the search ends"):
        sweeper.tell(study, study.ask(ranges), cell, optuna)


@pytest.mark.slow
def test_a_search_of_one_objective_ends_in_its_best(cli, tmp_path):
    one = ["objective=[test/answer_nll]", "hydra.sweeper.directions=[minimize]", "hydra.sweeper.n_trials=2"]
    done = cli("train.py", "-m", *SMALL, "hydra/sweeper=optuna", "resampler.num_tokens=choice(4,16)", *one)
    assert done.stdout.count("\n#") == 2 and "best of 2 trials" in done.stdout
    (file,) = (tmp_path / "runs" / "searches").glob("*.json")
    (best,) = json.loads(file.read_text())["best"]
    scores = [json.loads(f.read_text())["metrics"] for f in (tmp_path / "runs").rglob("results.json")]
    assert best["values"]["test/answer_nll"] == min(score["test/answer_nll"] for score in scores)


@pytest.mark.slow
def test_a_search_without_a_range_or_with_a_wrong_direction_is_one_line(cli):
    done = cli("train.py", "-m", *SMALL, "hydra/sweeper=optuna", check=False)
    assert done.returncode == 2 and "nothing to search: give a range" in done.stderr
    done = cli("train.py", *SEARCH, "hydra.sweeper.directions=[minimise,minimize]", check=False)
    assert done.returncode != 0 and "minimise is neither maximize nor minimize" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]]
)
def test_joblib_and_submitit_run_the_same_cells(cli, tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].split('=')[1].split('_')[0]}_launcher")
    cli("train.py", "-m", *SMALL, *launcher, "seed=0,1")
    results = [f for f in (tmp_path / "runs").glob("*/results.json") if not f.parent.is_symlink()]  # without `latest`
    written = [file.stat().st_mtime_ns for file in results]
    assert len(results) == 2
    cli("train.py", "-m", *SMALL, *launcher, "seed=0,1")  # both are found done
    assert [file.stat().st_mtime_ns for file in results] == written
