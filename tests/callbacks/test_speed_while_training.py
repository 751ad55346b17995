"""Time to first token as a metric of a training that does not notice it."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastvlm.callbacks.answer_speed import AnswerSpeed
from fastvlm.callbacks.metrics import Metrics
from fastvlm.callbacks.progress import Progress
from fastvlm.config import compose
from fastvlm.config.rules import check
from tests.conftest import TINY

DENSE = [*TINY, "pipeline=dense", "stages.dense.steps=4", "stages.dense.validate_every=2", "stages.dense.batch_size=4"]
DENSE += ["stages.dense.image_size=64", "stages.dense.val_samples=4", "hardware.num_workers=0", "log_every=1"]


def records_of(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_measures_its_speed_learns_the_same_weights_bit_by_bit(cli, tmp_path):
    learned, curves = [], []
    for images in (0, 2):
        done = cli("train.py", *DENSE, f"speed_images={images}", "name=a")
        (stage,) = (tmp_path / "runs" / "stages").iterdir()
        stage = stage.rename(tmp_path / f"{images}-{stage.name}")
        learned.append({f.name: f.read_bytes() for f in (stage / "handoff").glob("*.safetensors")})
        records = records_of(stage)
        curves.append([r[key] for key in ("train/loss", "val/loss") for r in records if key in r])
    assert len(curves[0]) == 6 and curves[0] == curves[1]
    assert len(learned[0]) >= 3 and learned[0] == learned[1]
    measured = [r for r in records if "speed/ttft_ms" in r]
    assert [r["step"] for r in measured] == [2, 4]
    keys = ("speed/ttft_ms", "speed/ttft_p95_ms", "speed/tokens_per_second", "speed/second_question")
    assert all(r[key] > 0 for r in measured for key in keys)
    assert measured[0]["speed/ttft_p95_ms"] >= measured[0]["speed/ttft_ms"]
    assert re.search(r"dense +done.* ttft [\d.]+ms", done.stdout)


def test_a_negative_number_of_images_is_refused():
    with pytest.raises(ValueError, match="speed_images=-1 must be a number of images"):
        check(compose("train", ["speed_images=-1"]))


def test_figures_reach_metrics_logger_and_progress_line(fit, tmp_path):
    out = io.StringIO()
    figures = {"speed/ttft_ms": 12.5, "speed/tokens_per_second": 80.0}
    callbacks = [metrics := Metrics(1), AnswerSpeed(lambda model: figures), Progress(console=Console(file=out))]
    fit(4, callbacks)
    assert [r["speed/ttft_ms"] for r in records_of(tmp_path) if "speed/ttft_ms" in r] == [12.5]
    assert metrics.last["speed/tokens_per_second"] == 80.0
    assert "ttft 12.5ms" in out.getvalue()


def test_modes_random_state_and_an_encoders_report_are_as_before(fit):
    taken = []

    def noisy(model):
        torch.rand(3)
        assert torch.is_inference_mode_enabled()
        model.eval()
        return {"speed/ttft_ms": 1.0}

    callback = AnswerSpeed(noisy)
    trainer = fit(1, [Metrics(1), callback])
    module = trainer.lightning_module.train()
    module.model.llm.eval()
    module.model.encoder.take_auxiliary = lambda: taken.append(1)
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    callback.on_validation_end(trainer, module)
    assert torch.equal(torch.rand(1), want) and taken == [1]
    assert module.model.training and module.model.encoder.training and not module.model.llm.training


def test_only_the_first_rank_measures(fit, monkeypatch):
    asked = []
    callback = AnswerSpeed(lambda model: asked.append(1) or {})
    trainer = fit(1, [Metrics(1), callback])
    assert asked == [1]
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    callback.on_validation_end(trainer, trainer.lightning_module)
    assert asked == [1]


def test_without_the_metrics_callback_it_says_so(fit):
    with pytest.raises(ValueError, match="needs the Metrics callback"):
        fit(1, [AnswerSpeed(lambda model: {})])


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_the_other_ranks_wait_for_the_first_and_all_learn_the_same(cli, tmp_path):
    learned = []
    for images in (0, 1):
        cli("train.py", *DENSE, "hardware.devices=2", f"speed_images={images}", "name=a")
        (stage,) = (tmp_path / "runs" / "stages").iterdir()
        stage = stage.rename(tmp_path / f"{images}-{stage.name}")
        learned.append({f.name: f.read_bytes() for f in (stage / "handoff").glob("*.safetensors")})
    assert len(learned[0]) >= 3 and learned[0] == learned[1]
    assert [r["step"] for r in records_of(stage) if "speed/ttft_ms" in r] == [2, 4]


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_where_no_rank_holds_the_model_it_is_said_that_nothing_is_measured(cli, tmp_path):
    done = cli("train.py", *DENSE, "hardware.strategy=fsdp", "hardware.devices=2", "speed_images=1", "name=a")
    assert "no speed is measured at validations: with fsdp no rank holds the model" in done.stdout
    (stage,) = (tmp_path / "runs" / "stages").iterdir()
    assert not any("speed/ttft_ms" in r for r in records_of(stage))
