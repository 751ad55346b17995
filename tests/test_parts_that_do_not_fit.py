"""Parts that do not fit are one line: which two numbers disagree, and which key mends it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastvlm.build import build_model, build_tokenizer
from fastvlm.callbacks.freezing import StageFreezing
from fastvlm.callbacks.handoff import read_manifest
from fastvlm.config import Adapt, check
from fastvlm.models.fit import check_fit
from fastvlm.models.resamplers.counts import side_of
from fastvlm.pipeline import Pipeline
from fastvlm.pipeline.learned import count_learned


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
        (
            ["stages.instruct.parts=[llm]"],
            r"stages.instruct.trainable.projector: projector learns, but stages.instruct.parts=\[llm\] is without it; "
            "set stages.instruct.trainable.projector=null, or add projector to stages.instruct.parts",
        ),
        (
            ["stages.base.adapt.encoder={method: partial, num: 1, lr: 1}"],
            r"stages.base.adapt.encoder: encoder learns, but stages.base.parts=.*; set stages.base.adapt.encoder=null",
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


def test_a_model_that_no_device_holds_whole_is_handed_on_unscored_and_its_evaluation_names_the_remedy(
    tiny_config, tmp_path, monkeypatch, capsys
):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    task = SimpleNamespace(text="prose", score_text=out_of_memory)
    monkeypatch.setattr("fastvlm.pipeline.chain.build_task", lambda _: task)
    steps = ["stages.base.steps=1", "stages.base.batch_size=2", "stages.base.val_samples=0"]
    pipeline = Pipeline(tiny_config("pipeline=base", "name=large", "hardware.num_workers=0", *steps))
    pipeline.config.task = {"_target_": "torch.nn.Identity"}
    merged, held = [], StageFreezing.merge
    tight = lambda self, model: held(self, model) if merged else merged.append(1) or out_of_memory()
    monkeypatch.setattr(StageFreezing, "merge", tight)
    monkeypatch.setattr(Pipeline, "evaluate", lambda self, results, stages: results)
    pipeline.run()
    manifest = read_manifest(tmp_path / "runs/large/stages/base/handoff")
    assert set(manifest["components"]) == {"llm"} and "test/text_perplexity" not in manifest["metrics"]
    assert "base: text perplexity is not measured: the whole model does not fit" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(pipeline.model, "to", out_of_memory)
    with pytest.raises(ValueError, match=r"large: its stages are finished, .* eval.py checkpoint=.*hardware=cpu"):
        pipeline.evaluate({}, [])


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


def test_weights_of_16_bits_that_would_learn_are_refused_with_the_remedy(tiny_config):
    config = tiny_config("pipeline=dense", "stages.dense.trainable.llm=1e-5")
    model = build_model(config, build_tokenizer(config))
    model.llm.bfloat16()
    with pytest.raises(ValueError, match=r"stages.dense.trainable: llm\..* is held in bfloat16, .* llm.dtype=float32"):
        count_learned("dense", config.stages.dense, model)
    config.stages.dense.trainable.llm = None
    config.stages.dense.adapt = {"llm": Adapt(method="lora", lr=1e-5, r=2)}
    assert count_learned("dense", config.stages.dense, model)


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
