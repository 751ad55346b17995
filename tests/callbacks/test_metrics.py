import json
import logging
import math
import time
from types import SimpleNamespace
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from tiny_stage import IMAGE_ID, TinyStage, make_batch

from fastvlm.callbacks.metrics import Metrics, keep_lines
from fastvlm.callbacks.positions import count_positions, read_counts


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_position_codes_count_samples_tokens_answers_images_and_padding():
    batch = make_batch(0)
    counts = read_counts(count_positions(batch, image_token_id=IMAGE_ID))
    assert counts["samples"].tolist() == [4, 3]
    assert counts["tokens"].tolist() == [3 * 6 + 16, 3 * 5]
    assert counts["answer_tokens"].tolist() == [8, 6] and int(counts["answer_tokens"].sum()) == batch.num_learned
    assert counts["image_tokens"].tolist() == [4, 3]
    assert int(counts["padding"]) == 3 * 5 == batch.input_ids.numel() - batch.num_tokens


def test_loss_of_a_window_is_the_mean_over_learned_tokens(fit, tmp_path):
    fit(8, [Metrics(4), Frozen()], validate=False)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 4, 8]
    stage = TinyStage()
    parts = [stage.measure(make_batch(i)) for i in range(4, 8)]
    total = sum(p["loss_sum"] for p in parts) / sum(p["source_tokens"].sum() for p in parts)
    per_source = sum(p["source_loss"] for p in parts) / sum(p["source_tokens"] for p in parts)
    assert lines[2]["train/loss"] == pytest.approx(float(total), rel=1e-5)
    assert lines[2]["train/loss/questions"] == pytest.approx(float(per_source[1]), rel=1e-5)
    accuracy = sum(p["token_accuracy"] for p in parts) / 4
    assert lines[2]["train/token_accuracy"] == pytest.approx(float(accuracy), abs=1e-6)


class Frozen(L.Callback):
    """Nothing learns: every step is comparable with a model made afresh."""

    def on_train_start(self, trainer, pl_module):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.0


def test_record_has_shares_speed_norms_rates_and_validation(fit, tmp_path):
    metrics = Metrics(5)
    trainer = fit(10, [metrics])
    lines = read_lines(tmp_path)
    last = next(line for line in reversed(lines) if "train/loss" in line)
    assert last["step"] == 10 and last["stage"] == "tiny" and abs(last["time"] - time.time()) < 60
    assert last["train/share_samples/captions"] == pytest.approx(4 / 7, rel=1e-6)
    assert last["train/share_tokens/captions"] == pytest.approx(34 / 49, rel=1e-6)
    assert last["train/share/questions"] == pytest.approx(3 / 7, rel=1e-6)
    assert last["train/padding"] == pytest.approx(15 / 64, rel=1e-6)
    text, image = last["train/text_tokens_per_second"], last["train/image_tokens_per_second"]
    assert text + image == pytest.approx(last["train/tokens_per_second"], rel=1e-5) and image > 0
    assert 0 <= last["train/data_wait"] < 1 and last["train/memory_gib"] > 0
    parts = [last["train/grad_norm/encoder"], last["train/grad_norm/llm"]]
    assert last["train/grad_norm"] == pytest.approx(math.hypot(*parts), rel=1e-5)
    assert last["train/lr/encoder"] == 1e-2 and last["train/lr/llm"] == 1e-3
    val = next(line for line in lines if "val/loss" in line)
    assert val["step"] == 10 and "val/loss/captions" in val and 0 <= val["val/token_accuracy"] <= 1
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(metrics.last["val/loss"], rel=1e-6)
    assert metrics.last["val/loss"] == pytest.approx(val["val/loss"], rel=1e-6)


def test_unreadable_samples_are_counted_and_named(fit, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fit(8, [Metrics(4)], validate=False)
    lines = read_lines(tmp_path)
    assert [line["train/skipped"] for line in lines] == [0, 1, 1]
    assert lines[1]["skipped_keys"] == ["captions_0007"] and "captions_0007" in caplog.text


def test_a_resumed_stage_writes_the_same_lines_as_an_uninterrupted_one(fit, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(12, [Metrics(4)], validate=False, folder=whole)

    checkpoint = L.pytorch.callbacks.ModelCheckpoint(dirpath=broken, filename="at", every_n_train_steps=6, save_top_k=1)
    fit(12, [Metrics(4), checkpoint, Crash(9)], validate=False, folder=broken, enable_checkpointing=True, stop=12)
    assert [line["step"] for line in read_lines(broken)] == [1, 4, 8]
    fit(12, [Metrics(4)], validate=False, folder=broken, ckpt_path=broken / "at.ckpt")

    a, b = read_lines(whole), read_lines(broken)
    assert [line["step"] for line in b] == [1, 4, 8, 12]
    exact = [k for k in a[-1] if "loss" in k or "share" in k or k in ("train/padding", "train/skipped", "step")]
    for left, right in zip(a, b, strict=True):
        assert {k: left[k] for k in exact} == pytest.approx({k: right[k] for k in exact}, rel=1e-6)


@pytest.mark.xdist_group("ranks")
def test_a_checkpoint_holds_what_all_ranks_have_counted_since_the_last_record(fit, tmp_path):
    states = []
    for ranks in (1, 2):
        saves = L.pytorch.callbacks.ModelCheckpoint(tmp_path / str(ranks), filename="at", every_n_train_steps=7)
        how = {"devices": ranks, "strategy": "ddp_fork" if ranks > 1 else "auto", "use_distributed_sampler": False}
        fit(8, [Metrics(8), saves], validate=False, folder=tmp_path / str(ranks), enable_checkpointing=True, **how)
        states.append(torch.load(tmp_path / str(ranks) / "at.ckpt", weights_only=False)["callbacks"]["Metrics"])
    one, two = states
    assert two["skipped"] == 2 * one["skipped"] and one["skipped"]
    ours, theirs = ({"window": s["window"], **s["losses"]["sums"]} for s in states)
    for key, counted in ours.items():
        torch.testing.assert_close(torch.tensor(theirs[key]), 2 * torch.tensor(counted), rtol=1e-4, atol=0)


class Crash(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.min_steps = None


def test_what_was_counted_of_a_source_stays_its_own_when_data_planned_anew_bring_others(tmp_path):
    rows = lambda *values: [[value] * 8 for value in values]
    losses = {"sums": {"source_loss": [5.0, 7.0], "source_tokens": [2.0, 3.0], "other": 1.0}, "batches": 4}
    state = {"losses": losses, "sources": ["a", "b"], "window": rows(1, 2, 3), "total": rows(4, 5, 6)}
    state |= {"seconds": {"step": 0.0, "wait": 0.0, "total": 1.0}, "skipped": [], "num_skipped": 0, "logged_step": 6}
    plan = SimpleNamespace(names=("new", "b"), sources=())
    trainer = Mock(spec=L.Trainer, is_global_zero=True, global_step=8, loggers=[], default_root_dir=tmp_path)
    trainer.datamodule = SimpleNamespace(plan=plan)
    metrics = Metrics()
    metrics.load_state_dict(state)
    metrics.on_train_start(trainer, Mock(spec=L.LightningModule, device=torch.device("cpu")))
    now = metrics.state_dict()
    assert now["sources"] == ["new", "b"] and now["window"] == rows(1, 0, 3) and now["total"] == rows(4, 0, 6)
    assert now["losses"]["sums"] == {"source_loss": [0.0, 7.0], "source_tokens": [0.0, 3.0], "other": 1.0}


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 3, "tra')
    keep_lines(path, step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_nothing_is_copied_from_the_device_between_two_records(fit, monkeypatch):
    """`.item()`, float(), int() and bool() of a tensor all end in Tensor.item or its kin."""
    metrics, calls = Metrics(10), []
    for name in ("item", "__float__", "__int__", "__bool__", "cpu", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _o=original, _n=name: calls.append(_n) or _o(self, *a))
    trainer = fit(1, [metrics], validate=False)
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 3
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 3
    batch, stage = make_batch(2), TinyStage()
    outputs = stage.measure(batch)
    calls.clear()
    metrics.on_train_batch_start(trainer, stage, batch, 2)
    metrics.on_before_optimizer_step(trainer, stage, None)
    metrics.on_train_batch_end(trainer, stage, outputs, batch, 2)
    assert calls == []


def test_every_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Metrics(0)
