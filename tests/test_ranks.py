"""Ranks that torchrun or srun start at once do as the first one does; nobody runs ahead of what it has decided."""

import fcntl
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from fastvlm.pipeline.ranks import agree
from fastvlm.pipeline.stage_folder import only_one
from tests.conftest import ROOT, TINY


def enter(rank: int, folder: Path) -> None:
    """A rank that comes to a stage, and notes what it was told and whether it might go on."""
    os.environ["RANK"] = str(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    wait_for(folder / "taken")
    (folder / f"came-{rank}").touch()
    with only_one(folder / "stage"):
        free = (folder / "free").exists()
        (folder / f"went-{rank}").write_text(json.dumps([agree(f"checkpoint of rank {rank}"), free]))


def wait_for(*paths: Path) -> None:
    deadline = time.time() + 60
    while not all(path.exists() for path in paths) and time.time() < deadline:
        time.sleep(0.01)


@pytest.mark.xdist_group("ranks")
def test_where_the_first_rank_waits_for_another_run_all_wait_and_then_go_on_from_the_same_checkpoint(tmp_path):
    assert agree("mine") == "mine", "a rank that is alone"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=enter, args=(rank, tmp_path)) for rank in (0, 1)]
    for rank in ranks:  # before the lock is taken: they would hold it too
        rank.start()
    (tmp_path / "stage").mkdir()
    with open(tmp_path / "stage" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (tmp_path / "taken").touch()
        wait_for(tmp_path / "came-0", tmp_path / "came-1")
        time.sleep(0.2)  # a rank that did not wait would be in it by now
        (tmp_path / "free").touch()
    for rank in ranks:
        rank.join(60)
    notes = [json.loads((tmp_path / f"went-{rank}").read_text()) for rank in (0, 1)]
    assert notes == [["checkpoint of rank 0", True]] * 2


def start(arguments: list[str], env: dict, out: Path) -> subprocess.Popen:
    """Two ranks under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    with open(out, "w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "env": env, "start_new_session": True}
        return subprocess.Popen([*command, str(ROOT / "train.py"), *arguments], **options)


def end(process: subprocess.Popen) -> None:
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(ranks, timeout=10)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_under_torchrun_a_stage_whose_mixture_was_edited_is_planned_anew_on_all_ranks_and_goes_on(
    embedded, tmp_path, strategy
):
    arguments = [*TINY, "pipeline=dense", "stages.dense.steps=20", "checkpoint_every=4", "name=edited"]
    arguments += ["stages.dense.batch_size=4", "mixture@stages.dense.mixture=embedded_45_45_10"]
    arguments += ["hardware.num_workers=0", "stages.dense.val_samples=0", "hardware.devices=2"]
    arguments += [f"hardware.strategy={strategy}"]
    runs, out = tmp_path / "runs", tmp_path / "out.txt"
    env = os.environ | {"FASTVLM_DATA": str(embedded), "FASTVLM_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    process, deadline = start(arguments, env, out), time.time() + 200
    while not (found := list(runs.glob("stages/*/step=8.ckpt"))) and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    end(process)
    assert found and "done" not in out.read_text(), out.read_text()
    newest = max(found[0].parent.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    state = torch.load(newest, weights_only=False)["MixtureDataModule"]
    step = int(newest.stem.split("=")[1])
    assert state["step"] + state["epoch"] > 0 and state["plan"] in (newest.parent / "shares.json").read_text()
    process = start([*arguments, "stages.dense.mixture.weights.text=30", "data.on_change=replan"], env, out)
    try:
        assert process.wait(200) == 0, out.read_text()
    except subprocess.TimeoutExpired:
        end(process)
        pytest.fail(f"ranks wait for each other:\n{out.read_text()}")
    said = out.read_text()
    assert re.search(rf"planned anew from step {step}: share of captions.*going on from step={step}.ckpt", said, re.S)
    assert "report:" in said
