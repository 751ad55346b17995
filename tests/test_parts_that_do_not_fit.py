"""Parts that do not fit are one line: which two numbers disagree, and which key mends it."""

import pytest
from torch import nn

from fastvlm.build import build_model, build_tokenizer
from fastvlm.models.fit import check_fit
from fastvlm.models.resamplers.counts import side_of
from fastvlm.pipeline import Pipeline


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
