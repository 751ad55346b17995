"""Parts that do not fit are one line: which two numbers disagree, and which key mends it."""

import pytest
import torch
from torch import nn

from fastvlm.build import build_model, build_tokenizer
from fastvlm.config import Adapt, check
from fastvlm.models.fit import check_fit
from fastvlm.models.resamplers.counts import side_of
from fastvlm.pipeline import Pipeline
from fastvlm.pipeline.training import count_learned


class Part(nn.Module):
    def __init__(self, **widths):
        super().__init__()
        self.__dict__.update(widths)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resampler.in_dim=64", "resampler.in_dim=64, but what stands beside it needs 16: leave resampler.in_dim out"),
        ("projector.out_dim=64", "projector.out_dim=64, but what stands beside it needs 32"),
        ("llm.vocab_size=7", "llm.vocab_size=7, but what stands beside it needs"),
    ],
)
def test_a_width_of_ones_own_is_not_ignored(tiny_config, override, message):
    config = tiny_config(override)
    with pytest.raises(ValueError, match=message):
        build_model(config, build_tokenizer(config))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["resampler=identity", "stages.align.max_tokens=64"],
            "max_tokens=64, but one view has 64 visual tokens at im",
        ),
        (["stages.align.max_tokens=4096"], "max_tokens=4096, but llm has 1024 positions: lower max_tokens"),
        (["resampler.num_tokens=100"], "resampler.num_tokens=100 .*64"),
        (
            ["stages.instruct.image_size=65"],
            "stages.instruct: image_size=65 is not a multiple of the encoder's stride 8",
        ),
    ],
)
def test_token_counts_that_do_not_fit_are_told_before_any_training(tiny_config, tmp_path, overrides, message):
    pipeline = Pipeline(tiny_config("pipeline=three_stage", *overrides))
    with pytest.raises(ValueError, match=message):
        pipeline.run()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.instruct.trainable={llm.layers.9*: 1e-3}"], "stages.instruct.trainable: the pattern 'llm.layers.9"),
        (["stages.instruct.last_layers={num: 99, lr: 1e-3}"], "stages.instruct.last_layers.num=99, but the language"),
        (
            [
                "stages.instruct.trainable.llm=null",
                "stages.instruct.adapt.llm={method: lora, lr: 1, targets: [q_projj]}",
            ],
            "stages.instruct.adapt.llm.targets: no linear layer is named q_projj; there are .*q_proj",
        ),
    ],
)
def test_what_a_later_stage_cannot_train_is_told_before_any_training(
    tiny_config, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr(Pipeline, "run_stage", lambda *_: pytest.fail("a stage was trained"))
    config = tiny_config("pipeline=embedded", *overrides)
    check(config)
    pipeline = Pipeline(config)
    with pytest.raises(ValueError, match=message):
        pipeline.run()
    assert not (tmp_path / "runs").exists()


def test_counting_what_a_stage_trains_changes_neither_model_nor_randomness(tiny_config):
    config = tiny_config("pipeline=embedded", "stages.instruct.trainable.llm=null")
    config.stages.instruct.adapt = {"llm": Adapt(method="lora", lr=1e-3, r=2)}
    model = build_model(config, build_tokenizer(config))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    count = count_learned("instruct", config.stages.instruct, model)
    projections = [m for n, m in model.llm.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    learned = [p for n, p in model.named_parameters() if config.stages.instruct.trainable.get(n.split(".")[0])]
    assert learned and count == sum(p.numel() for p in learned) + sum(2 * sum(m.weight.shape) for m in projections)
    assert torch.equal(torch.get_rng_state(), drawn)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"resampler": Part(in_dim=9, out_dim=8)}, "encoder yields a width of 8, but resampler takes 9"),
        ({"projector": Part(in_dim=9, out_dim=8)}, "resampler yields a width of 8, but projector takes 9"),
        ({"projector": Part(in_dim=8, out_dim=9)}, "projector yields tokens of width 9, but llm takes 8"),
    ],
)
def test_parts_built_by_hand_say_which_two_widths_disagree(parts, message):
    fitting = {"encoder": Part(out_dim=8), "resampler": Part(out_dim=8), "projector": Part(), "llm": Part(dim=8)}
    check_fit(**fitting)
    with pytest.raises(ValueError, match=message):
        check_fit(**(fitting | parts))


def test_a_class_token_in_a_grid_is_named():
    with pytest.raises(ValueError, match="577 patches, no square grid; .* encoder.class_token=false"):
        side_of(577)
    with pytest.raises(ValueError, match="12 patches, no square grid; use resampler=perceiver$"):
        side_of(12)
