"""`dry_run=true` needs neither the weights nor the machine to say what a run would be and whether it would fit."""

import sys

import pytest
import torch
from omegaconf import OmegaConf

from fastvlm.config import CONF, check
from fastvlm.study.dry_run import build_without_weights, describe
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "models"))
from tiny_checkpoints import MAKERS, save_checkpoint  # noqa: E402

from fastvlm.models.llms.published import PUBLISHED  # noqa: E402
from fastvlm.models.pretrained import from_pretrained, without_weights  # noqa: E402


@pytest.mark.parametrize("path", sorted((CONF / "llm").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_named_language_model_is_known_without_the_hub(path):
    config = OmegaConf.load(path)
    if "path" in config and not OmegaConf.is_missing(config, "path"):
        assert config.path in PUBLISHED


@pytest.mark.parametrize("kind", MAKERS)
def test_a_pretrained_model_without_weights_has_its_names_and_shapes(kind, tmp_path):
    folder = str(save_checkpoint(kind, tmp_path))
    whole, bare = from_pretrained(folder), without_weights(folder)
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    shapes = lambda model: {name: value.shape for name, value in model.state_dict().items()}
    assert shapes(bare) == shapes(whole)


def big(tiny_config, *more: str):
    """A composed run of CLIP's size on the hardware that `more` names."""
    from fastvlm.config import compose

    base = ["pipeline=align", "encoder=siglip_l16_384", "resampler=perceiver", "resampler.heads=16", "logger=none"]
    base += ["stages.align.image_size=384", "~task", "num_samples=0"]
    tiny_config("pipeline=align")  # points the paths to temporary folders
    config = compose("train", [*base, *more])
    check(config)
    return config


@pytest.mark.parametrize(
    "more, said",
    [
        (["hardware=t4_colab"], ["memory   align:", " of 11.00"]),
        (["hardware=t4_colab", "hardware.memory_gib=1"], ["will not fit, ", " being most of it: "]),
        (["hardware=gpu"], [" of what hardware.memory_gib says"] if not torch.cuda.is_available() else [" of "]),
    ],
)
def test_memory_on_a_machine_that_is_not_here_is_said_with_the_keys_that_mend_a_misfit(tiny_config, capsys, more, said):
    describe(big(tiny_config, *more))
    shown = capsys.readouterr().out
    assert all(words in shown for words in said), shown


def test_what_a_dry_run_builds_still_learns(tiny_config):
    """Counting operations leaves every parameter as it found it."""
    config = tiny_config("pipeline=dense", "resampler=perceiver")
    model = build_without_weights(config)
    describe(config)
    assert all(p.requires_grad for p in model.parameters())


def test_a_whole_model_that_cannot_be_fetched_is_one_line(tiny_config, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = tiny_config("vlm=llava_1_5")
    check(config)
    with pytest.raises(
        ValueError, match="vlm.path=llava-hf/llava-1.5-7b-hf: .*name a folder with config.json"
    ) as found:
        describe(config)
    assert "\n" not in str(found.value)
