"""VLMEvalKit through our server, in an environment of its own: FASTVLM_VLMEVAL names its Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
KIT = os.environ.get("FASTVLM_VLMEVAL")
# Enough steps for answers that are words: an empty one VLMEvalKit asks again, and takes for a failure.
SPEAKS = [
    "pipeline=dense",
    "encoder.dims=[8,16]",
    "llm.hidden_size=32",
    "llm.intermediate_size=64",
    "llm.num_hidden_layers=2",
    "llm.num_attention_heads=2",
    "logger=none",
    "hardware=cpu",
    "hardware.threads=1",
    "~task",
    "num_samples=0",
    "mixture@stages.dense.mixture=embedded_instruct",
    "stages.dense.trainable={encoder: 3e-3, resampler: 3e-3, projector: 3e-3, llm: 3e-3}",
    "stages.dense.image_size=64",
    "stages.dense.steps=100",
]


@pytest.mark.slow
@pytest.mark.skipif(not KIT, reason="FASTVLM_VLMEVAL=<python of an environment with VLMEvalKit> is not given")
def test_vlmevalkit_is_answered_as_our_own_evaluation_is_and_gives_the_same_score(cli, embedded, tmp_path):
    cli("train.py", *SPEAKS, "name=speaks", timeout=280)
    options = [f"run={tmp_path}/runs/latest", f"kit={KIT}", "count=24", "tokens=6"]
    command = [sys.executable, str(ROOT / "benchmarks" / "vlmevalkit.py"), *options]
    env = os.environ | {"FASTVLM_DATA": str(embedded), "FASTVLM_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\d+) unlike answers; ours the same: (\w+)\n  VLMEvalKit ([\d.]+), ours ([\d.]+)", done.stdout)
    assert [same for _, same, _, _ in found] == ["True", "True"], done.stdout
    unlike, _, theirs, ours = found[0]
    assert int(unlike) > 1 and float(theirs) > 0 and theirs == ours, done.stdout
