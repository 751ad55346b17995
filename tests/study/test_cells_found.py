"""A cell that was done before is found, and one that is replaced leaves nothing that says it is done."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fastvlm.config import check, compose
from fastvlm.identity import SCORING, code_hash, hash_of, identity, libraries, remember
from fastvlm.pipeline.run_folder import claim_run_dir
from fastvlm.study.cell import finished_cell


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
    runs = Path(config.paths.runs)
    folder = runs / name
    folder.mkdir(parents=True)
    for file in ("config.yaml", "lineage.json", "mlflow.json", "report.html"):
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
