"""Arms are command-line overrides: what they expand to, and what a wrong one is told."""

import re

import pytest
from omegaconf import OmegaConf

from fastvlm.config import check, compose
from fastvlm.config.composition import SILENT
from fastvlm.study.arms import cell_name, expand, is_silent, key_of, load_study, merge, study_names
from fastvlm.study.cells import planned
from fastvlm.study.claims import all_claims, load_claims, load_figures
from tests.study.made_cells import put_study

STUDIES = study_names()


def test_an_arm_is_written_out_and_the_command_line_wins_over_it():
    given = ["experiment=llava_align", "arm=skip_long", "seed=3", "stages.instruct.steps=9"]
    overrides = expand(given)
    assert overrides[0] == "experiment=llava_align" and "~stages.align" in overrides
    assert "stages.instruct.steps=9" in overrides and "stages.instruct.steps=217" not in overrides
    assert "name=studies/llava_align/micro/skip_long-seed3-stages.instruct.steps_9" in overrides
    config = compose("train", given)
    assert list(config.stages) == ["encoder", "base", "instruct"] and config.stages.instruct.steps == 9


def test_a_sweep_and_a_plain_command_are_left_alone():
    for arguments in (
        ["-m", "experiment=llava_align", "arm=align,skip"],
        ["experiment=seeds", "seed=1"],
        ["resampler=avgpool"],
        ["experiment=llava_align"],
    ):
        assert expand(arguments) == arguments
    once = expand(["experiment=llava_align", "arm=skip"])
    assert expand(once) == once


def test_a_flag_keeps_its_value_and_its_place_before_the_overrides():
    overrides = expand(["experiment=llava_align", "--cfg", "job", "arm=skip"])
    assert overrides[:3] == ["--cfg", "job", "experiment=llava_align"]


@pytest.mark.parametrize(
    ("override", "key"),
    [("a.b=1", "a.b"), ("++a=1", "a"), ("~a", "a"), ("mixture@stages.align.mixture=x", "stages.align.mixture")],
)
def test_two_overrides_of_one_key_are_known_as_such(override, key):
    assert key_of(override) == key
    assert merge(["first=1", override], [f"{key}=2"]) == ["first=1", f"{key}=2"]


def test_what_changes_nothing_learned_changes_no_cells_name():
    plain = expand(["experiment=llava_align", "arm=skip", "seed=1"])
    silent = ["logger=none", "hardware.num_workers=1", "data.on_change=replan"]
    silent = expand(["experiment=llava_align", "arm=skip", "seed=1", *silent])
    name = f"name={cell_name('llava_align', 'micro', 'skip', 1)}"
    assert name in plain and name in silent


def test_changed_cells_have_names_of_their_own_that_fit_a_folder():
    def name(*changes):
        expanded = expand(["experiment=llava_align", "arm=skip", "seed=1", *changes])
        return next(word for word in expanded if word.startswith("name="))

    assert name("encoder.layer=-1") != name("encoder.layer=1")
    long = [f"stages.instruct.trainable.{'x' * 200}{i}=1" for i in range(2)]
    assert name(*long) != name(long[0]) and all(len(name(one).split("/")[-1]) < 200 for one in long)
    assert len({name(one) for one in long}) == 2


@pytest.mark.parametrize("override", ["hardware.precision=32-true", "hardware.quantise=nf4"])
def test_what_changes_numbers_changes_the_name_of_a_cell_and_of_a_run(override):
    given = ["experiment=llava_align", "arm=skip", "seed=1"]
    name = lambda arguments: next(word for word in expand(arguments) if word.startswith("name="))
    assert name([*given, override]) != name(given) and not is_silent(override)
    assert not re.match(SILENT, override) and not re.match(SILENT, f"++{override}")
    assert re.match(SILENT, "hardware.num_workers=1") and re.match(SILENT, "hardware=cpu")


@pytest.mark.parametrize(
    ("grid", "cells"),
    [
        ("arm: choice(align, skip)\n      seed: range(0,5,2)", [("align", 0), ("align", 2), ("align", 4)]),
        ("arm: align\n      seed: choice(1,3)", [("align", 1), ("align", 3)]),
        ("arm: align\n      seed: range(3)", [("align", 0), ("align", 1), ("align", 2)]),
    ],
)
def test_a_grid_is_planned_in_every_form_that_hydra_sweeps(tmp_path, grid, cells):
    file = put_study(tmp_path) / "study.yaml"
    old = "arm: align,skip,skip_long\n      seed: range(5)"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, grid))
    found = planned(load_study("llava_align", root=tmp_path), scale="micro")
    assert [cell for cell in found if cell[0] == "align"] == cells


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=llava_algn", "arm=skip"], "did you mean llava_align"),
        (["experiment=llava_align", "arm=skp"], "did you mean arm=skip"),
        (["experiment=llava_align", "arm=skip", "scale=big"], "scale=big: experiment=llava_align has micro"),
        (["experiment=llava_align", "arm=align,skip"], "several are a sweep, add -m"),
        (["arm=skip"], "arm=skip is one of a study's: add experiment=<study>, one of .*llava_align"),
        (["-m", "resampler=avgpool", "scale=paper"], "scale=paper is one of a study's: add experiment="),
        (["experiment=blind", "scale=paper"], "blind is not a study"),
    ],
)
def test_an_arm_or_scale_of_no_study_and_an_unknown_one_are_told(arguments, words):
    with pytest.raises(ValueError, match=words):
        expand(arguments)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("skip: [~stages.align]", "skip: ~stages.align", "study.micro.arms.skip=~stages.align must be a list of over"),
        ("skip: [~stages.align]", "skip: 3", "study.micro.arms.skip=3 must be a list of overrides, such as"),
        ("skip: [~stages.align]", "skip: [stages.align.steps: 3]", "study.micro.arms.skip=.* must be a list of over"),
        ("all: [pipeline=micro]", "all: pipeline=micro", "study.micro.all=pipeline=micro must be a list"),
        ("name: llava_align", "name: llava", "study.name=llava must be llava_align, as its folder is called"),
        ("arm: align,skip,skip_long", "arm: [align, skip]", "hydra.sweeper.params.arm=.* is not a sweep"),
        (
            "params:\n      arm: align,skip,skip_long\n      seed: range(5)",
            "params: 3",
            "hydra.sweeper.params=3 must hold",
        ),
        ("  paper:\n", "  paper: big\n  papr:\n", "study.papr is not one of study.name, study.micro, study.paper"),
        ("    all: [pipeline=llava]\n", "    al: []\n", "study.paper.al is not one of study.paper.all, study"),
        ("study:\n", "- study:\n", "study.yaml, line"),
    ],
)
def test_a_mistake_in_a_studys_file_is_one_line_with_file_and_key(tmp_path, old, new, words):
    file = put_study(tmp_path) / "study.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=words) as error:
        load_study("llava_align", root=tmp_path)
    assert "llava_align/study.yaml" in str(error.value) and "\n" not in str(error.value)


def compose_arm(name: str, scale: str, arm: str):
    config = compose("train", [f"experiment={name}", f"arm={arm}", f"scale={scale}", "seed=1"])
    check(config)
    assert config.name == f"studies/{name}/{scale}/{arm}-seed1"
    whole = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)  # as a run does before anything else
    assert whole["study"] == {"name": name, "applied": arm}
    return {k: v for k, v in config.items() if k not in ("name", "arm", "study")}


@pytest.mark.parametrize("name", STUDIES)
def test_the_last_arm_of_every_study_composes_to_its_last_interpolation_at_every_scale(name):
    study = load_study(name)
    assert "micro" in study.arms and study.question
    assert all(planned(study, scale=scale) for scale in study.arms)
    for scale, arms in study.arms.items():
        compose_arm(name, scale, list(arms)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_composes_at_its_scale_and_none_is_anothers_twin(name):
    for scale, arms in load_study(name).arms.items():
        seen = []
        for arm in arms:
            plain = compose_arm(name, scale, arm)
            assert plain not in seen, f"{arm} is another arm's twin"
            seen.append(plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in STUDIES if "paper" in load_study(n).arms])
def test_every_arm_passes_a_dry_run_at_the_papers_own_sizes(cli, name):
    done = cli("train.py", f"experiment={name}", "scale=paper", "dry_run=true", timeout=900)
    assert all(f"\n{arm}: encoder " in done.stdout for arm in load_study(name).arms["paper"])


# (study, scale, arm) of claims whose first pair a scale does not have. MM1 has no row below 224 px, which is `base`.
NOT_THERE = {("mm1_resolution", "paper", "low")}


@pytest.mark.parametrize("name", STUDIES)
def test_every_claim_has_its_first_pair_at_every_scale(name):
    study = load_study(name)
    for scale, arms in study.arms.items():
        lacks = {(name, scale, arm) for claim in all_claims(study) for arm in claim.lacks(arms)}
        assert lacks <= NOT_THERE
        assert load_claims(study, scale=scale)


@pytest.mark.parametrize("name", STUDIES)
def test_every_claim_names_arms_and_figures_that_exist(name):
    study = load_study(name)
    claims, figures = load_claims(study), load_figures(study.folder)
    assert claims
    assert all(key in figures for claim in claims for key in claim.figures)
    assert len({claim.claim for claim in claims}) == len(claims)


@pytest.mark.parametrize("arm", ["narrow_1", "wide_16"])
def test_decay_under_mm1s_law_is_a_tenth_of_the_rate_that_all_parts_have(arm):
    stage = compose("train", ["experiment=mm1_lr_law", "scale=paper", f"arm={arm}"]).stages.align
    (rate,) = set(stage.trainable.values())
    assert list(stage.trainable) == ["resampler", "projector", "encoder", "llm"]
    assert stage.optimizer.weight_decay == pytest.approx(rate / 10)


@pytest.mark.parametrize(
    ("study", "arm", "projectors"),
    [
        ("ferret_v2_granularity", "fused", ["both"]),
        ("ferret_v2_granularity", "dino_tiles", ["coarse_mlp", "fine_mlp"]),
        ("ferret_v2_stages", "none", ["coarse_mlp", "fine_mlp"]),
    ],
)
def test_projectors_inside_ferret_v2s_encoder_learn_instructions_at_the_projectors_rate(study, arm, projectors):
    rates = compose("train", [f"experiment={study}", "scale=paper", f"arm={arm}"]).stages.instruct.trainable
    assert rates.encoder == 2e-6 and {rates[f"encoder.{name}"] for name in projectors} == {rates.projector}


@pytest.mark.parametrize("arm", ["c_abstractor", "d_abstractor"])
def test_every_abstractor_of_honeybee_ends_at_the_least_rate_of_its_table_11(arm):
    stages = compose("train", ["experiment=honeybee_abstractors", "scale=paper", f"arm={arm}"]).stages
    least = {name: max(stage.trainable.values()) * stage.final for name, stage in stages.items()}
    assert least == pytest.approx({"align": 1e-5, "instruct": 1e-6}, rel=0.02)
    assert {stage.optimizer.eps for stage in stages.values()} == {1e-6}
