"""Results count for an arm as it is configured now, wherever they were made; what no seed varies is told."""

import functools
import shutil

import pytest
from omegaconf import OmegaConf

from fastvlm.config import check, compose, composition
from fastvlm.identity import hash_of, identity
from fastvlm.study.arms import load_study
from fastvlm.study.cells import read_runs, write_csv
from fastvlm.study.composed import Composed, composed, one_training
from fastvlm.study.report import report, say
from tests.study.made_cells import cell, configured, put_study
from tests.study.test_study_command import put_run

TWO = """# @package _global_
# Does what stands below differ?
study:
  name: below
  micro:
    all: [pipeline=micro]
    arms:
      base: []
      steps: [stages.instruct.steps=9]
      fine: [stages.encoder.image_size=32]
      fine_seeds: [stages.encoder.image_size=32, "stages.encoder.seed=${seed}"]
      base_seeds: ["stages.encoder.seed=${seed}"]
      deep: [llm.num_hidden_layers=3]
hydra: {sweeper: {params: {arm: "base,steps,fine", seed: range(5)}}}
"""
CLAIMS = """
- {claim: Fine is better., paper: p, table: t, metric: test/answer_nll, direction: lower, steps: [fine, base]}
- {claim: Steps matter., paper: p, table: t, metric: test/answer_nll, direction: lower, steps: [steps, base]}
- {claim: Fine is slow., paper: p, table: t, metric: test/ttft_ms, direction: higher, steps: [fine, base], factor: 1}
"""


@pytest.fixture
def align(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_RUNS", str(tmp_path / "runs"))
    return load_study("llava_align", root=put_study(tmp_path / "studies").parent)


@pytest.fixture
def below(tmp_path):
    folder = tmp_path / "studies" / "below"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(TWO)
    (folder / "claims.yaml").write_text(CLAIMS)
    return load_study("below", root=folder.parent)


def edit_conf(tmp_path, monkeypatch) -> None:
    shutil.copytree(composition.CONF, tmp_path / "conf")
    file = tmp_path / "conf" / "pipeline" / "micro.yaml"
    text = file.read_text()
    assert text.count("steps: 150") == 1
    file.write_text(text.replace("steps: 150", "steps: 151"))
    monkeypatch.setattr(composition, "CONF", tmp_path / "conf")


def test_an_arm_composed_once_is_for_every_seed_what_a_run_of_it_composes(below):
    for seed in (0, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTVLM_STUDIES", str(below.folder.parent))
            patch.setattr("fastvlm.study.arms.load_study", functools.partial(load_study, root=below.folder.parent))
            config = compose("train", ["experiment=below", "arm=fine_seeds", f"seed={seed}"])
        check(config)
        ran = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        assert ran["stages"]["encoder"]["seed"] == ran["seed"] == seed
        one = composed(below, scale="micro", arm="fine_seeds")
        assert identity(one.resolved(seed)) == identity(ran) and one.knows(hash_of(identity(ran)), seed=seed)
        assert not one.knows(hash_of(identity(ran)), seed=seed + 1)


def test_a_configuration_is_the_same_wherever_its_data_lie(align, monkeypatch, tmp_path):
    here = composed(align, scale="micro", arm="skip")
    portable, placed = here.hash(0), hash_of(identity(here.resolved(0)))
    monkeypatch.setenv("FASTVLM_DATA", "/elsewhere/data")
    there = Composed(here.config)
    resolved = there.resolved(0)
    assert resolved["tokenizer"]["path"].startswith("/elsewhere/data/")
    assert hash_of(identity(resolved)) != placed and there.hash(0) == portable
    # A run that read its data there is a cell; one whose config.yaml is no longer that of its results is none.
    one = cell("skip", 0, nll=0.5, config=hash_of(identity(resolved)))
    put_run(tmp_path / "runs", one)
    file = tmp_path / "runs/studies/llava_align/micro/skip-seed0/config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(resolved)))
    (found,), _ = read_runs(align, tmp_path / "runs", scale="micro")
    assert found.about["config"] == portable
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(resolved | {"seed": 1})))
    assert read_runs(align, tmp_path / "runs", scale="micro")[0] == []


def test_results_of_before_conf_was_edited_are_none_of_the_arms(align, monkeypatch, tmp_path):
    cells = [cell(arm, seed, nll=0.5 + 0.1 * seed) for arm in ("align", "skip") for seed in range(2)]
    for one in cells:
        put_run(tmp_path / "runs", one, study=align)
    found, missing = read_runs(align, tmp_path / "runs", scale="micro")
    assert len(found) == 4 and {one.reason for one in missing} == {"has not run"}
    write_csv(align.folder / "results.csv", found)
    assert "another configuration" not in "\n".join(say(report("llava_align", source="csv", root=align.folder.parent)))
    edit_conf(tmp_path, monkeypatch)
    # Taken over from another study, they are of what they were all the same.
    file = tmp_path / "runs/studies/llava_align/micro/skip-seed0/config.yaml"
    file.write_text("study: {name: other}\n")
    found, missing = read_runs(align, tmp_path / "runs", scale="micro")
    others = [str(one) for one in missing if one.reason != "has not run"]
    assert found == [] and len(others) == 4 and others[0] == "arm=align seed=0 was run with another configuration"
    # What was published is shown, and said to be so, in one line of page and terminal.
    for source in ("csv", "auto"):
        made = report("llava_align", source=source, root=align.folder.parent)
        page = (align.folder / "README.md").read_text()
        words = "4 of 4 cells were run with another configuration of their arm than is composed now"
        assert page.count("another configuration") == page.count(f"{words} (2 of align, 2 of skip)") == 1
        assert sum(line.startswith(words) for line in say(made)) == 1 and "equal in all 2 seeds" in page


def test_an_arm_that_no_longer_composes_is_told_and_its_rows_are_shown(align, monkeypatch):
    one = Composed(None, fault="conf has no such key")
    monkeypatch.setattr("fastvlm.study.composed.composed", lambda *_, **__: one)
    monkeypatch.setattr("fastvlm.study.report.composed", lambda *_, **__: one)
    write_csv(align.folder / "results.csv", [cell(arm, s, nll=0.5) for arm in ("align", "skip") for s in range(5)])
    made = report("llava_align", source="csv", root=align.folder.parent)
    assert "whether cells of skip are of its configuration is not known: conf has no such key" in say(made)
    assert "equal in all 5 seeds" in (align.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("first", "second", "parts"),
    [
        ("fine", "base", ("encoder",)),
        ("steps", "base", ()),  # the same encoder
        ("fine_seeds", "base_seeds", ()),  # one for each seed
        ("fine_seeds", "base", ("encoder",)),  # of which one side has one
        ("deep", "base", ("language model",)),
        ("deep", "fine", ("encoder", "language model")),
    ],
)
def test_parts_below_that_differ_between_arms_and_not_between_seeds_are_found(below, first, second, parts):
    sides = [[composed(below, scale="micro", arm=arm)] for arm in (first, second)]
    assert one_training(*sides) == parts


def test_a_verdict_on_one_training_of_what_stands_below_says_so(below):
    levels = {"base": 0.7, "steps": 0.6, "fine": 0.5}
    cells = [cell(arm, s, nll=nll + 0.001 * s * len(arm)) for arm, nll in levels.items() for s in range(5)]
    write_csv(below.folder / "results.csv", configured(below, cells))
    made = report("below", source="csv", root=below.folder.parent)
    fine, steps, slow = made["entries"]
    assert fine["verdict"] == "agrees (one encoder per arm)" and steps["verdict"] == "agrees"
    assert "encoder" not in slow["verdict"]  # of a time another training would change nothing
    page = (below.folder / "README.md").read_text()
    said = "Each arm's encoder was trained once for all seeds, so the interval does not include what another training"
    assert page.count("was trained once for all seeds") == 1 and said in page.split("### Steps")[0]
    assert "trained once and shared by all seeds" in page


def test_a_verdict_on_cells_of_another_configuration_says_so_wherever_it_is_read(below):
    levels = {"base": 0.7, "steps": 0.6, "fine": 0.5}
    cells = [cell(arm, s, nll=nll + 0.001 * s * len(arm)) for arm, nll in levels.items() for s in range(5)]
    now = configured(below, cells)
    now[-1] = cells[-1]  # of `fine`
    write_csv(below.folder / "results.csv", now)
    made = report("below", source="csv", root=below.folder.parent)
    assert [entry["verdict"] for entry in made["entries"]] == [
        "agrees (one encoder per arm; cells of another configuration)",
        "agrees",
        "not resolved (1,000 seeds would not tell) (cells of another configuration)",
    ]
    lines = [line for line in say(made) if line.endswith("cells of another configuration)")]
    assert len(lines) == 2 and {line.strip() for line in lines} < set(made["verdicts"]["micro"])
