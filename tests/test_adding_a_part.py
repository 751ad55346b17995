"""Adding a resampler is one file and one YAML: those of CONTRIBUTING.md, put beside the repository, train."""

import os
import re
from pathlib import Path

import pytest

from fastvlm.build import instantiate
from tests.conftest import ROOT, TINY

PART = "import torch\nfrom torch import nn\n\n\n"


@pytest.fixture
def stride(tmp_path) -> Path:
    """A folder with the package `mine` and the configuration group `conf/resampler`, as CONTRIBUTING.md writes them."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = dict(re.findall(r"```(python|yaml)\n(.*?)```", guide, re.S))
    dedent = lambda text: re.sub(r"^ {3}", "", text, flags=re.M)
    folder = tmp_path / "elsewhere"
    (folder / "mine").mkdir(parents=True)
    (folder / "conf" / "resampler").mkdir(parents=True)
    (folder / "mine" / "stride.py").write_text(PART + dedent(blocks["python"]))
    yaml = dedent(blocks["yaml"]).replace("fastvlm.models.resamplers.stride", "mine.stride")
    assert "_target_: mine.stride.StrideResampler" in yaml
    (folder / "conf" / "resampler" / "stride.yaml").write_text(yaml)
    return folder


def test_one_file_and_one_yaml_outside_the_repository_train_and_take_their_own_key(
    stride, commands, cli_place, tmp_path
):
    command = [str(ROOT / "train.py"), *TINY, "pipeline=align", "stages.align.steps=2", "name=mine"]
    command += [f"hydra.searchpath=[file://{stride}/conf]", "resampler=stride", "resampler.stride=4"]
    done = commands.run(command, **cli_place(PYTHONPATH=f"{ROOT}{os.pathsep}{stride}"))
    assert done.returncode == 0, done.stdout + done.stderr
    # It has no parameters; the stage's rate for the resampler is no mistake for that.
    assert "resampler StrideResampler 0.00M" in done.stdout
    config = (tmp_path / "runs" / "mine" / "config.yaml").read_text()
    assert "mine.stride.StrideResampler" in config and "stride: 4" in config
    assert (tmp_path / "runs" / "mine" / "results.json").exists()


def test_a_stage_is_trained_anew_when_the_code_of_a_users_own_part_or_objective_changes(stride, commands, cli_place):
    objective = stride / "mine" / "objective.py"
    objective.write_text("from fastvlm.stages import LanguageStage\n\n\nclass Own(LanguageStage):\n    pass\n")
    command = [str(ROOT / "train.py"), *TINY, "pipeline=align", "stages.align.steps=2", "name=mine", "resampler=stride"]
    command += ["stages.align.objective._target_=mine.objective.Own", f"hydra.searchpath=[file://{stride}/conf]"]

    def trains() -> bool:
        done = commands.run(command, **cli_place(PYTHONPATH=f"{ROOT}{os.pathsep}{stride}"))
        assert done.returncode == 0, done.stdout + done.stderr
        return "peak memory" in done.stdout  # the last line of a training

    assert trains() and not trains()
    for file in (objective, stride / "mine" / "stride.py"):
        code = file.read_text()
        file.write_text(code + "# said\n")
        assert not trains()
        file.write_text(code + "other = 1\n")
        assert trains()


def test_a_key_the_new_part_does_not_take_is_refused_by_name(stride, tiny_config, monkeypatch):
    monkeypatch.syspath_prepend(str(stride))
    config = tiny_config(f"hydra.searchpath=[file://{stride}/conf]", "resampler=stride", "resampler.strid=4")
    with pytest.raises(ValueError, match="unknown key resampler.strid: .*; did you mean resampler.stride?"):
        instantiate(config.resampler, key="resampler", in_dim=8)


def test_the_mean_number_of_kept_tokens_is_reported_beside_the_loss(cli, tmp_path):
    options = ["resampler=token_select", "resampler.min_tokens=4", "resampler.coverage=0.2", "projector=cross_modal"]
    cli("train.py", *TINY, "pipeline=align", "stages.align.steps=2", *options, "name=kept", "log_every=1")
    lines = (tmp_path / "runs" / "kept" / "stages" / "align" / "metrics.jsonl").read_text()
    kept = [float(value) for value in re.findall(r'"(?:train|val)/kept_tokens": ([\d.]+)', lines)]
    assert len(kept) >= 3 and all(4 <= value <= 16 for value in kept)
