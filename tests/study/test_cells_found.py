"""A cell that was done before is found, and one that is replaced leaves nothing that says it is done."""

import copy
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fastvlm.config import check, compose
from fastvlm.hardware import Hardware
from fastvlm.identity import SCORING, code_hash, hash_of, identity, libraries, remember
from fastvlm.pipeline.run_folder import check_run_dir, claim_run_dir
from fastvlm.study.cell import finished_cell, objective


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_RUNS", str(tmp_path))
    config = compose("train", ["experiment=llava_align", "arm=align", "seed=0", "logger=none"])
    check(config)
    return config


def put_done(config, *, name: str):
    """The run directory of this configuration as another study's run leaves it."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    made = {"config": hash_of(identity(resolved)), "code": code_hash(SCORING), "libraries": libraries()}
    made["hardware"] = Hardware().decides()
    runs = Path(config.paths.runs)
    folder = runs / name
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(resolved), folder / "config.yaml")
    for file in ("lineage.json", "mlflow.json", "report.html"):
        (folder / file).write_text("{}")
    (folder / "results.json").write_text(json.dumps({"metrics": {"test/answer_nll": 0.5}, "made": made}))
    remember(folder, runs, resolved)
    return folder


def test_a_cell_taken_from_another_study_has_no_run_in_mlflow_yet(config, tmp_path):
    put_done(config, name="studies/other/micro/same-seed0")
    assert finished_cell(config)["metrics"] == {"test/answer_nll": 0.5}
    own = tmp_path / config.name
    assert (own / "results.json").exists() and not (own / "mlflow.json").exists()


def test_a_run_that_replaces_another_no_longer_has_its_end(config, tmp_path):
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    own = put_done(config, name=config.name)
    claim_run_dir(own, runs=tmp_path, resolved=resolved)  # the same command again: its results stay true
    assert (own / "results.json").exists() and not (own / "lineage.json").exists()
    claim_run_dir(own, runs=tmp_path, resolved=resolved | {"overwrite": True})
    assert sorted(path.name for path in own.iterdir()) == ["config.yaml", "mlflow.json"]


@pytest.mark.parametrize("key, value", [("quantise", "nf4"), ("precision", "64-true")])
def test_a_cell_of_another_precision_or_quantisation_is_not_this_one(config, key, value):
    put_done(config, name=config.name)
    assert finished_cell(config)
    OmegaConf.update(config, f"hardware.{key}", value, force_add=True)
    assert finished_cell(config) is None


def test_a_cell_whose_arm_has_changed_runs_again_in_its_place(config, tmp_path):
    own = put_done(config, name=config.name)
    config.stages.align.steps = 7
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    assert finished_cell(config) is None
    check_run_dir(own, resolved=resolved)
    claim_run_dir(own, runs=tmp_path, resolved=resolved)
    assert not (own / "results.json").exists()
    with pytest.raises(ValueError, match="holds another configuration .*stages.align.steps"):
        other = copy.deepcopy(resolved) | {"study": None}
        other["stages"]["align"]["steps"] = 8
        check_run_dir(own, resolved=other)


def test_a_public_benchmark_yields_no_objective_unless_one_of_its_metrics_is_named():
    done = {"metrics": {"test/vqav2/vqa_accuracy": 0.7}}
    assert objective(done, names=["test/exact_match/mean"]) is None
    assert objective(done, names=["test/vqav2/vqa_accuracy"]) == 0.7
    with pytest.raises(ValueError, match="yields no test/answer_nll"):
        objective(done, names=["test/answer_nll"])
