"""Shared fixtures: a small embedded data set built once a session, and a quick command line over it."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastvlm.warm import WarmProcess, WarmPython  # noqa: E402

# Under nohup, or in the background of a script, Ctrl-C is ignored, and commands started from here would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test and its fixtures draw does not depend on the tests that ran in this process before."""
    import torch

    torch.manual_seed(0)


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


class Commands:
    """Commands as a user gives them, from processes that have the libraries imported; what they print is kept."""

    def __init__(self, folder: Path):
        self.python, self.folder, self.count = WarmPython(), folder, itertools.count()

    def start(self, command: list[str], **place) -> WarmProcess:
        number = next(self.count)
        with open(self.folder / f"{number}.out", "w") as out, open(self.folder / f"{number}.err", "w") as err:
            process = self.python.start(command, stdout=out, stderr=err, **place)
        process.output = lambda: tuple((self.folder / f"{number}.{name}").read_text() for name in ("out", "err"))
        return process

    def run(self, command: list[str], *, timeout: float = 200.0, **place) -> subprocess.CompletedProcess:
        """As `subprocess.run(..., capture_output=True, text=True)`; at the time limit its whole session is killed."""
        process = self.start(command, **place)
        try:
            process.wait(float(timeout))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its ranks and loader workers
            process.wait()
            pytest.fail("\n".join([f"{' '.join(command)} took more than {timeout} s", *process.output()]))
        return subprocess.CompletedProcess(process.args, process.returncode, *process.output())


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.python.close()


@pytest.fixture
def cli_place(embedded, tmp_path):
    """Environment and folder of a user whose data and runs lie in temporary folders."""
    own = {"FASTVLM_DATA": str(embedded), "FASTVLM_RUNS": str(tmp_path / "runs")}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return lambda **more: {"env": os.environ | own | more, "cwd": tmp_path}


@pytest.fixture
def cli(commands, cli_place):
    """Run a script of the repository as a user does; returns the finished process."""

    def run(script: str, *args: str, check: bool = True, timeout: float = 200.0) -> subprocess.CompletedProcess:
        done = commands.run([str(ROOT / script), *args], timeout=timeout, **cli_place())
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
