"""Weights shared by DeepSpeed's ZeRO on two CPU ranks: what is learned, handed on and gone on with.

Skipped without the extra `deepspeed`, which is built for the torch that is there: pip install '.[deepspeed]'.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.test_pipeline import RANKS, TINY, assert_same_weights, kill_at_step_8

pytest.importorskip("deepspeed", reason="needs the extra deepspeed: pip install '.[deepspeed]' ninja")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("ranks")]

ZERO = ["hardware.devices=2", "hardware.strategy=deepspeed_zero3"]


def both(cli, tmp_path: Path, options: list[str]) -> list[Path]:
    """Run folders of the same two ranks under DDP and under DeepSpeed."""
    ranks = {"ddp": ["hardware.devices=2"], "zero": ZERO}
    runs = [
        {"runs": str(tmp_path / name), "ranks": 2, "overrides": [*options, *more, "name=run"]}
        for name, more in ranks.items()
    ]
    cli("tests/forked_runs.py", json.dumps(runs), timeout=600.0)
    return [tmp_path / name / "run" for name in ranks]


def weights_in(run: Path, stage: str = "dense") -> dict[str, dict[str, torch.Tensor]]:
    return {file.stem: load_file(file) for file in (run / "stages" / stage / "handoff").glob("*.safetensors")}


def losses_in(run: Path, stage: str = "dense") -> list[float]:
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [v for one in map(json.loads, lines) for k, v in one.items() if k in ("train/loss", "val/loss")]


@pytest.mark.parametrize("mixture", ["embedded_45_45_10", "embedded_base", "embedded_align"])
def test_losses_and_weights_are_those_of_ddp_with_and_without_images(cli, tmp_path, mixture):
    options = [*RANKS, f"mixture@stages.dense.mixture={mixture}", "stages.dense.steps=4", "log_every=1"]
    options += ["stages.dense.val_samples=8", "hardware.accumulate=2"]
    ddp, zero = both(cli, tmp_path, options)
    assert len(losses_in(ddp)) >= 5
    assert losses_in(zero) == pytest.approx(losses_in(ddp), rel=1e-5)
    assert_same_weights(weights_in(zero), weights_in(ddp))
    rows = json.loads((zero / "stages/dense/freezing.json").read_text())["rows"]
    assert any(r["part"] == "encoder" and not r["trainable"] and not r["changed"] for r in rows)
    assert any(r["part"] == "llm" and r["trainable"] and r["changed"] for r in rows)


def test_whole_weights_go_to_the_next_stage_and_adapters_come_out_merged(cli, tmp_path):
    options = [*TINY, "pipeline=three_stage", "~stages.dense", "stages.align.steps=2"]
    options += ["stages.instruct.steps=2", "stages.instruct.lora=null", "stages.instruct.image_size=64"]
    options += ["stages.instruct.adapt.llm={method: lora, lr: 1e-3}", "hardware.num_workers=0", "encoder.mlp_ratio=2.0"]
    options += [f"stages.{s}.{k}" for s in ("align", "instruct") for k in ("val_samples=8", "batch_size=4")]
    ddp, zero = both(cli, tmp_path, options)
    for stage in ("align", "instruct"):
        assert_same_weights(weights_in(zero, stage), weights_in(ddp, stage))
    handed = json.loads((zero / "stages/instruct/handoff/manifest.json").read_text())["parent"]
    assert {Path(one["folder"]).parent.name.split("-")[0] for one in handed.values()} == {"align"}
    assert not any("lora" in key for key in weights_in(zero, "instruct")["llm"])


def test_a_killed_stage_goes_on_and_ends_with_the_same_weights(cli, commands, embedded, tmp_path):
    arguments = [*TINY, *ZERO, "pipeline=dense", "stages.dense.steps=16", "checkpoint_every=4", "name=killed"]
    arguments += ["stages.dense.batch_size=4", "hardware.num_workers=0", "stages.dense.trainable.llm=1e-3"]
    cli("train.py", *arguments, timeout=400.0)
    (undisturbed,) = (tmp_path / "runs" / "stages").iterdir()
    runs = tmp_path / "killed"
    own = {"FASTVLM_DATA": str(embedded), "FASTVLM_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    kill_at_step_8(commands, arguments, runs, os.environ | own)
    done = commands.run([str(ROOT / "train.py"), *arguments], env=os.environ | own, timeout=400.0)
    assert done.returncode == 0 and "going on from step=" in done.stdout, done.stderr
    (stage,) = (runs / "stages").iterdir()
    for name in ("encoder", "resampler", "projector", "llm"):
        ours, theirs = (load_file(s / "handoff" / f"{name}.safetensors") for s in (stage, undisturbed))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
