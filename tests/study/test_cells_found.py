"""A cell that was done before is found, and one that is replaced leaves nothing that says it is done."""

import copy
import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fastvlm.config import check, compose
from fastvlm.hardware import Hardware
from fastvlm.identity import SCORING, code_hash, hash_of, identity, libraries, remember
from fastvlm.pipeline.run_folder import check_run_dir, claim_run_dir, point
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
    for file in ("mlflow.json", "report.html"):
        (folder / file).write_text("{}")
    lineage = {"components": {"projector": os.path.relpath(runs / "stages/align/handoff", folder)}}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    (folder / "results.json").write_text(json.dumps({"metrics": {"test/answer_nll": 0.5}, "made": made}))
    remember(folder, runs, resolved)
    return folder


@pytest.mark.parametrize("before", [[], ["mlflow.json", "predictions/old.png", "stages/old/x"]])
def test_a_cell_taken_from_another_study_is_that_run_with_its_links_but_not_its_run_in_mlflow(config, tmp_path, before):
    other = put_done(config, name="deeper/studies/other/micro/same-seed0")
    own, stage = tmp_path / config.name, tmp_path / "stages" / "align-1234"
    stage.mkdir(parents=True)
    point(other / "stages" / "align", at=stage)
    (other / "predictions").mkdir()
    (other / "predictions" / "new.png").touch()
    (other / "lineage.json").unlink()  # it is being evaluated again
    own.mkdir(parents=True)  # as Hydra leaves it, or an older configuration of the arm
    for name in before:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).touch()
    assert finished_cell(config)["metrics"] == {"test/answer_nll": 0.5}
    files = {str(path.relative_to(own)) for path in own.rglob("*") if path.is_file()}
    assert files == {"results.json", "config.yaml", "report.html", "predictions/new.png"}
    assert [link.name for link in (own / "stages").iterdir()] == ["align"]
    assert (own / "stages" / "align").resolve() == stage
    assert OmegaConf.load(own / "config.yaml").name == config.name


@pytest.mark.parametrize("begun", [False, True])
def test_a_cell_taken_from_a_run_at_another_depth_names_the_same_handoffs(config, tmp_path, begun):
    put_done(config, name="same")
    own = tmp_path / config.name
    if begun:
        own.mkdir(parents=True)
    assert finished_cell(config)
    handoff = own / json.loads((own / "lineage.json").read_text())["components"]["projector"]
    assert handoff.resolve() == tmp_path / "stages/align/handoff"


def test_a_run_that_replaces_another_no_longer_has_its_end(config, tmp_path):
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    own = put_done(config, name=config.name)
    claim_run_dir(own, runs=tmp_path, resolved=resolved)  # the same command again: its results stay true
    assert (own / "results.json").exists() and not (own / "lineage.json").exists()
    claim_run_dir(own, runs=tmp_path, resolved=resolved | {"overwrite": True})
    assert sorted(path.name for path in own.iterdir()) == ["config.yaml", "mlflow.json"]


@pytest.mark.parametrize("key, value", [("quantise", "nf4"), ("precision", "16-mixed")])
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
