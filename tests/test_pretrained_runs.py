"""A pretrained vision-language model goes through stages, handoff, a second run and the engine like one of ours."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "models"))
from tiny_checkpoints import save_checkpoint  # noqa: E402

from fastvlm.build import load_run, settle_views  # noqa: E402
from fastvlm.config import check  # noqa: E402
from fastvlm.pipeline import Pipeline  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("llava_next", tmp_path_factory.mktemp("llava_next"))


def test_a_pretrained_model_is_tuned_handed_on_and_asked(folder, tiny_config, capsys):
    few = ["stages.instruct.steps=2", "stages.instruct.batch_size=2", "stages.instruct.max_tokens=600"]
    config = tiny_config("vlm=llava_1_6", f"vlm.path={folder}", *few, "stages.instruct.max_images=40")
    check(config)
    run = Pipeline(config)
    assert run.config.stages.instruct.image_size == 28 and run.config.stages.instruct.image.fit == "squash"
    assert [2, 2] in run.config.stages.instruct.image.tiles
    run.run()
    proof = json.loads((run.run_dir / "stages" / "instruct" / "freezing.json").read_text())["rows"]
    moved = {row["part"]: row["changed"] for row in proof if row["trainable"]}
    assert moved["projector"] > 0 and moved["llm"] > 0 and "encoder" not in moved
    model, tokenizer, loaded = load_run(run.run_dir)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value.cpu(), model.state_dict()[name]), name
    Pipeline(tiny_config("vlm=llava_1_6", f"vlm.path={folder}", *few, "stages.instruct.max_images=40")).run()
    assert "instruct: finished before" in capsys.readouterr().out


def test_a_size_of_null_needs_a_pretrained_model(tiny_config):
    with pytest.raises(ValueError, match="stages.dense.image_size=null is a pretrained model's own size"):
        check(tiny_config("stages.dense.image_size=null"))


def test_a_model_that_cannot_be_fetched_is_one_line(tiny_config):
    config = tiny_config("vlm=llava_1_5", "vlm.path=nobody/nothing")
    with pytest.raises(ValueError, match=r"vlm.path=nobody/nothing: .*; name a folder with config.json"):
        settle_views(config)
