"""Our plugin in lmms-eval, in an environment of its own: FASTVLM_LMMS names its Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LMMS = os.environ.get("FASTVLM_LMMS")
ALIGN = [
    "pipeline=align",
    "encoder.dims=[8,16]",
    "llm.hidden_size=32",
    "llm.intermediate_size=64",
    "llm.num_hidden_layers=2",
    "llm.num_attention_heads=2",
    "logger=none",
    "hardware=cpu",
    "~task",
    "num_samples=0",
    "stages.align.steps=2",
]


@pytest.mark.slow
@pytest.mark.skipif(not LMMS, reason="FASTVLM_LMMS=<python of an environment with lmms-eval> is not given")
def test_lmms_eval_finds_our_model_and_both_give_the_same_answers_and_score(cli, embedded, tmp_path):
    cli("train.py", *ALIGN, "name=tiny")
    options = [f"run={tmp_path}/runs/latest", f"lmms={LMMS}", "count=24", "rounds=1", "batch_size=5"]
    command = [sys.executable, str(ROOT / "benchmarks" / "evaluation.py"), *options]
    env = os.environ | {"FASTVLM_DATA": str(embedded), "FASTVLM_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "answers the same: True" in done.stdout
    scores = next(line for line in done.stdout.splitlines() if line.startswith("scores ["))
    assert scores.count(",") == 0  # one score, to the last digit
