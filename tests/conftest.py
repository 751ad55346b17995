"""Shared fixtures: a small embedded data set built once a session, and a quick command line over it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A tiny model and short stages: what is tested is the machinery, not the learning.
TINY = [
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
    "log_every=2",
]


@pytest.fixture(scope="session")
def embedded(tmp_path_factory) -> Path:
    """A data folder that holds a hundredth of the embedded data set."""
    from data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare("embedded", out=folder / "embedded", scale=0.01)
    return folder


@pytest.fixture
def cli(embedded, tmp_path):
    """Run a script of the repository as a user does; returns the finished process."""

    def run(script: str, *args: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
        env = os.environ | {
            "FASTVLM_DATA": str(embedded),
            "FASTVLM_RUNS": str(tmp_path / "runs"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *args], env=env, cwd=tmp_path, capture_output=True, text=True, **kwargs
        )
        if check:
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def tiny_config(embedded, tmp_path, monkeypatch):
    """Compose conf/train.yaml for the tiny model, with runs and data in temporary folders."""
    monkeypatch.setenv("FASTVLM_DATA", str(embedded))
    monkeypatch.setenv("FASTVLM_RUNS", str(tmp_path / "runs"))
    from fastvlm.config import compose

    return lambda *overrides: compose("train", [*TINY, *overrides])
