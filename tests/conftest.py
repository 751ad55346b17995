"""Shared fixtures: a small embedded data set built once a session, and a quick command line over it."""

import os
import signal
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


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is left in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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

    def run(script: str, *args: str, check: bool = True, timeout: int = 200) -> subprocess.CompletedProcess:
        env = os.environ | {
            "FASTVLM_DATA": str(embedded),
            "FASTVLM_RUNS": str(tmp_path / "runs"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(ROOT / script), *args]
        pipe = subprocess.PIPE
        # A session of its own: when time is up its ranks and loader workers go with it.
        process = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{' '.join(args)} took more than {timeout} s\n{out}\n{err}")
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
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
