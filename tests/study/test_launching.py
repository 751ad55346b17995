"""What surrounds a sweep: cores and GPUs shared among its cells, tab completion, the dashboard."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import psutil
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from fastvlm.study.arms import expand, load_study, study_names, value_of
from fastvlm.study.cells import planned
from fastvlm.study.report import runs_folder
from fastvlm.study.sweep import check_yield, prepare
from hydra_plugins.fastvlm_process_launcher import process_launcher
from hydra_plugins.fastvlm_process_launcher.process_launcher import ProcessLauncher, in_turns
from tests.conftest import ROOT
from tests.study.made_cells import cell, put_study
from tests.study.test_study_command import put_run


def slots(monkeypatch, *, cores: int, gpus: int = 0, study: bool = True, parallel=None, jobs: int = 8, **hardware):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(process_launcher, "visible_gpus", lambda: [str(i) for i in range(gpus)])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher = ProcessLauncher(parallel=parallel)
    launcher.config = OmegaConf.create({"hardware": hardware, "study": {"name": "x"} if study else None})
    return launcher.slots(jobs)


def test_cells_side_by_side_share_the_cores_and_a_cells_ranks_share_its_own(monkeypatch):
    assert slots(monkeypatch, cores=8) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert slots(monkeypatch, cores=8, jobs=2) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert slots(monkeypatch, cores=8, parallel=3) == [{"OMP_NUM_THREADS": "2"}] * 3
    # Without a GPU a cell divides its threads among its ranks (fastvlm/hardware.py): 2 cells of 2 ranks fill 8 cores.
    assert slots(monkeypatch, cores=8, jobs=2, devices=2) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert len(slots(monkeypatch, cores=8, devices=2)) == 4
    assert slots(monkeypatch, cores=8, study=False) == [{}] == slots(monkeypatch, cores=1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # said by the user
    launcher = ProcessLauncher(parallel=2)
    launcher.config = OmegaConf.create({"hardware": {}})
    assert launcher.slots(5) == [{"OMP_NUM_THREADS": "1"}] * 2


def test_each_cell_has_gpus_of_its_own(monkeypatch):
    four = slots(monkeypatch, cores=16, gpus=4)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in four] == ["0", "1", "2", "3"]
    assert {slot["OMP_NUM_THREADS"] for slot in four} == {"4"}
    pairs = slots(monkeypatch, cores=16, gpus=4, devices=2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in pairs] == ["0,1", "2,3"]
    assert {slot["OMP_NUM_THREADS"] for slot in pairs} == {"4"}
    assert all("CUDA_VISIBLE_DEVICES" not in slot for slot in slots(monkeypatch, cores=4, gpus=4, accelerator="cpu"))


def test_arms_of_a_seed_run_close_together_and_seeds_side_by_side():
    grid = [[f"arm={arm}", f"seed={seed}"] for arm in "ab" for seed in range(5)]
    turns = in_turns(list(enumerate(grid, start=3)), at_once=2)
    assert [job[0][-1] + job[1][-1] for _, job in turns] == ["a0", "a1", "b0", "b1", "a2", "a3", "a4", "b2", "b3", "b4"]
    assert all(grid[index - 3] == job for index, job in turns)
    lone = list(enumerate([["arm=b"], ["arm=a"]]))
    assert in_turns(lone, at_once=4) == lone


def test_a_study_is_launched_in_these_turns_and_its_cells_come_back_in_order(monkeypatch):
    for place in ("prepare", "time_grid", "conclude"):
        monkeypatch.setattr(f"fastvlm.study.sweep.{place}", lambda *_, **__: None)
    for place in ("setup_globals", "configure_log"):
        monkeypatch.setattr(process_launcher, place, lambda *_: None)
    ran = []

    def run(_, index, overrides, slot, *, quiet):
        ran.append(overrides)
        return JobReturn(overrides=overrides, hydra_cfg=index, status=JobStatus.COMPLETED)

    monkeypatch.setattr(ProcessLauncher, "cell", run)
    launcher = ProcessLauncher(parallel=1, warm=False)
    launcher.config = OmegaConf.create(
        {"hydra": {"hydra_logging": None, "verbose": False}, "hardware": {}, "study": {"name": "x"}, "dry_run": False}
    )
    grid = [[f"arm={arm}", f"seed={seed}"] for arm in "ab" for seed in range(2)]
    assert [cell.overrides for cell in launcher.launch(grid, 0)] == grid
    assert ran == [grid[0], grid[2], grid[1], grid[3]]


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("study.yaml", "seed: range(5)", "seed: interval(0,5)", "seed=interval.0,5. is neither range.0,5. nor numbers"),
        ("claims.yaml", "two_stage_gqa", "two_stage_gq", "figures names two_stage_gq, which paper.csv has not; did"),
        ("paper.csv", "key,table", "name,table", "its columns are name, table"),
    ],
)
def test_what_the_page_would_stumble_over_is_told_before_a_grid_runs(tmp_path, monkeypatch, file, old, new, words):
    place = put_study(tmp_path) / file
    assert old in place.read_text()
    place.write_text(place.read_text().replace(old, new, 1))
    monkeypatch.setattr("fastvlm.study.sweep.load_study", lambda name: load_study(name, root=tmp_path))
    config = OmegaConf.create({"study": {"name": "llava_align"}, "scale": "micro", "dry_run": True})
    with pytest.raises(ValueError, match=words):
        prepare(config, [["arm=align", "seed=0"]])


def test_a_grid_without_a_new_page_ends_as_failed_and_still_names_its_failed_cells(monkeypatch):
    def no_page(*_):
        raise ValueError("no figure")

    ended = []
    for place in ("prepare", "time_grid"):
        monkeypatch.setattr(f"fastvlm.study.sweep.{place}", lambda *_, **__: None)
    monkeypatch.setattr("fastvlm.study.sweep.report", no_page)
    monkeypatch.setattr("fastvlm.study.sweep.load_study", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr("fastvlm.study.sweep.end", lambda config, status: ended.append(status))
    for place in ("setup_globals", "configure_log"):
        monkeypatch.setattr(process_launcher, place, lambda *_: None)
    failed = JobReturn(overrides=["arm=a"], hydra_cfg=0, status=JobStatus.FAILED)
    monkeypatch.setattr(ProcessLauncher, "cell", lambda *_, **__: failed)
    launcher = ProcessLauncher(parallel=1, warm=False)
    config = {"hydra": {"hydra_logging": None, "verbose": False}, "hardware": {}, "dry_run": False}
    launcher.config = OmegaConf.create(config | {"study": {"name": "x"}, "paths": {"runs": str(runs_folder())}})
    with pytest.raises(ValueError, match="1 of 1 cells failed: #0 arm=a; the study has no new page: no figure"):
        launcher.launch([["arm=a", "seed=0"]], 0)
    assert ended == ["FAILED"]


def test_cells_whose_overrides_begin_alike_have_log_files_of_their_own(tmp_path):
    launcher = ProcessLauncher()
    launcher.config = OmegaConf.create({"paths": {"runs": str(tmp_path)}})
    long = [f"stages.instruct.trainable.{'x' * 120}=1"]
    assert launcher.log_file(0, [*long, "seed=0"]) != launcher.log_file(1, [*long, "seed=1"])


def test_a_finished_cell_without_the_metric_of_a_claim_is_named(tmp_path):
    one = cell("align", 0, nll=0.5)
    del one.metrics["test/answer_nll"]
    put_run(tmp_path, one)
    config = OmegaConf.create({"study": {"name": "llava_align"}, "scale": "micro", "paths": {"runs": str(tmp_path)}})
    job = ["experiment=llava_align", "arm=align", "seed=0"]
    with pytest.raises(ValueError, match="test/answer_nll, which the task of arm=align did not yield"):
        check_yield(config, job)
    check_yield(config, [*job[:2], "seed=1"])  # has no results
    one.metrics["test/answer_nll"] = 0.5
    put_run(tmp_path, one, name="align-seed2")
    check_yield(config, [*job[:2], "seed=2"])
    del one.metrics["test/exact_match/mean"]  # stands beside it
    put_run(tmp_path, one, name="align-seed3")
    check_yield(config, [*job[:2], "seed=3"])


def test_a_grid_with_other_settings_is_not_asked_for_the_metrics_of_claims(tmp_path):
    one = cell("align", 0, nll=0.5)
    del one.metrics["test/answer_nll"]
    put_run(tmp_path, one, name="align-seed0-task.shots_0_4_")
    config = OmegaConf.create({"study": {"name": "llava_align"}, "scale": "micro", "paths": {"runs": str(tmp_path)}})
    check_yield(config, ["experiment=llava_align", "arm=align", "seed=0", "task.shots=[0,4]"])


@pytest.mark.parametrize("name", study_names())
def test_the_grid_of_every_study_is_at_each_scale_the_arms_that_the_scale_has(name):
    study = load_study(name)
    for scale in study.arms:
        typed = expand(["-m", f"experiment={name}", f"scale={scale}"])[1:]
        parser = OverridesParser.create()
        given = parser.parse_overrides([*(f"{k}={v}" for k, v in study.grid.items()), *typed])
        (jobs,) = BasicSweeper.split_arguments(given, None)
        prepare(OmegaConf.create({"study": {"name": name}, "scale": scale, "dry_run": True}), jobs)
        assert [(value_of(job, "arm"), int(value_of(job, "seed"))) for job in jobs] == planned(study, scale=scale)
        assert {value_of(job, "arm") for job in jobs} == study.arms[scale].keys()


def test_an_arm_of_another_scale_named_on_the_command_line_is_refused():
    typed = ["-m", "experiment=mm1_resolution", "scale=paper", "arm=low,base"]
    assert expand(typed) == typed
    config = OmegaConf.create({"study": {"name": "mm1_resolution"}, "scale": "paper", "dry_run": True})
    with pytest.raises(ValueError, match="arm=low: experiment=mm1_resolution has no such arm at scale=paper"):
        prepare(config, [["arm=low"], ["arm=base"]])


def test_the_tab_key_completes_studies_and_parts():
    for typed, found in (("experiment=llava_a", "experiment=llava_align"), ("resampler=perc", "resampler=perceiver")):
        line = {"COMP_LINE": f"python train.py {typed}", "COMP_POINT": "99", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "train.py"), "-sc", "query=bash"]
        done = subprocess.run(command, env=os.environ | line, capture_output=True, text=True)
        assert found in done.stdout.split(), done.stderr


@pytest.mark.slow
def test_make_dashboard_prints_the_address_and_answers_on_loopback(tmp_path):
    # The environment is taken as it is: neither `env` nor what it depends on is made.
    # Under `make test`, make would print the folder first.
    place = ["--no-print-directory", f"VENV={sys.prefix}", "-o", "env", "-o", f"{sys.prefix}/.ready", "PORT=5917"]
    process = subprocess.Popen(
        ["make", *place, "dashboard"], cwd=ROOT, env=os.environ | {"FASTVLM_RUNS": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:5917", address)
        answer, deadline = None, time.time() + 120
        while answer is None and time.time() < deadline:
            try:
                answer = urllib.request.urlopen(f"{address}/health", timeout=5).read()
            except OSError:
                time.sleep(0.5)
        assert answer == b"OK"
        assert (tmp_path / "mlflow.db").exists()
        open_here = [c.laddr for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.laddr.port == 5917]
        assert {where.ip for where in open_here} == {"127.0.0.1"}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
