"""A grid's time by the clock: noted by sweeps, added up for the cells that a page shows, kept apart from results."""

import json
import os
import time

import pytest
from omegaconf import OmegaConf

from fastvlm.study.arms import load_study
from fastvlm.study.cells import write_csv
from fastvlm.study.grid import FILE, Sweep, note, read_sweeps, say_grid, write_sweeps
from fastvlm.study.report import report
from fastvlm.study.sweep import time_grid
from tests.study.made_cells import cell, grid, put_study
from tests.study.test_study_command import put_run

ALL = tuple(f"{arm}-seed{seed}" for arm in ("align", "skip", "skip_long") for seed in range(5))


def test_sweeps_of_one_grid_add_up_and_one_that_was_run_again_whole_is_left_out(tmp_path):
    file, cells = tmp_path / FILE, grid()
    note(file, Sweep("micro", 20.0, 2, ALL[:9]))
    assert say_grid(read_sweeps(file), cells, scale="micro") == (
        "The grid: 20 minutes by the clock, 9 of 15 cells, 2 at once."
    )
    note(file, Sweep("micro", 11.5, 1, ALL[9:]))
    note(file, Sweep("micro", 0.1, 2, ()))  # all found done
    words = "The grid: 31.5 minutes by the clock in 2 sweeps, 15 cells, 1 to 2 at once."
    assert say_grid(read_sweeps(file), cells, scale="micro") == words
    assert say_grid(read_sweeps(file), cells, scale="paper") == ""
    note(file, Sweep("micro", 25.0, 2, ALL))
    assert say_grid(read_sweeps(file), cells, scale="micro") == (
        "The grid: 25 minutes by the clock, 15 cells, 2 at once."
    )


def test_a_sweep_says_what_it_ran_and_what_it_found(tmp_path, capsys):
    begun = time.time()
    for name, began in (("align-seed0", begun), ("align-seed1", begun - 60), ("skip-seed0", begun)):
        arm, seed = name.split("-seed")
        put_run(tmp_path, cell(arm, int(seed), nll=0.5))
        file = tmp_path / "studies/llava_align/micro" / name / "results.json"
        results = json.loads(file.read_text())
        results["made"]["began"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began))
        file.write_text(json.dumps(results))
    config = OmegaConf.create({"study": {"name": "llava_align"}, "scale": "micro", "paths": {"runs": str(tmp_path)}})
    put_run(tmp_path, cell("skip", 1, nll=0.5))  # of before that was noted
    jobs = [[f"arm={arm}", f"seed={seed}"] for arm in ("align", "skip") for seed in range(3)]
    time_grid(config, ["arm=align", "seed=0"], begun=begun, at_once=2, jobs=jobs)
    assert "llava_align: 0.0 minutes by the clock, 2 cells run, 2 at once, 2 found done" in capsys.readouterr().out
    (sweep,) = read_sweeps(tmp_path / "studies" / "llava_align" / FILE)
    assert sweep.cells == ("align-seed0", "skip-seed0") and sweep.at_once == 2
    time_grid(config, ["max_steps=1"], begun=begun - 600, at_once=None)  # of other cells than the study's
    assert "10.0 minutes by the clock\n" in capsys.readouterr().out
    assert read_sweeps(tmp_path / "studies" / "llava_align" / FILE) == [sweep]


def test_a_sweeps_time_is_that_of_cells_it_trained_itself(tmp_path):
    begun = time.time()
    for arm, seed, ended in (("align", 0, begun), ("align", 1, begun - 600), ("skip", 0, begun)):
        one = cell(arm, seed, nll=0.5)
        put_run(tmp_path, one)
        folder = tmp_path / f"studies/llava_align/micro/{arm}-seed{seed}"
        results = json.loads((folder / "results.json").read_text())
        results["made"]["began"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(begun))
        (folder / "results.json").write_text(json.dumps(results))
        manifest = folder / "stages/align/handoff/manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        os.utime(manifest, (ended, ended))
    config = OmegaConf.create({"study": {"name": "llava_align"}, "scale": "micro", "paths": {"runs": str(tmp_path)}})
    shared = tmp_path / "stages" / "base-1"
    for file in (shared / "handoff/manifest.json", tmp_path / "stages" / "base-2" / "handoff/manifest.json"):
        file.parent.mkdir(parents=True)
        file.touch()
    os.utime(shared / "handoff/manifest.json", (begun - 60, begun - 60))
    for cell_folder in ("align-seed0", "align-seed1"):
        (tmp_path / "studies/llava_align/micro" / cell_folder / "stages/base").symlink_to(shared)
    (tmp_path / "studies/llava_align/micro/align-seed0/stages/more").symlink_to(tmp_path / "stages" / "base-2")
    # skip ran meanwhile by another command; seed 1 was only evaluated again
    jobs = [["arm=align", f"seed={seed}"] for seed in range(2)]
    time_grid(config, ["arm=align", "seed=0"], begun=begun, at_once=1, jobs=jobs)
    (sweep,) = read_sweeps(tmp_path / "studies" / "llava_align" / FILE)
    assert sweep.cells == ("align-seed0",) and sweep.found == 1
    assert "1 cells, 1 at once; 1 stage had been trained before." in say_grid(
        [sweep], [cell("align", 0, nll=0.5)], scale="micro"
    )


@pytest.fixture
def align(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_RUNS", str(tmp_path / "runs"))
    return load_study("llava_align", root=put_study(tmp_path / "studies").parent)


def test_the_time_is_published_beside_results_csv_which_it_leaves_alone(align, tmp_path):
    cells = grid()
    for one in cells:
        put_run(tmp_path / "runs", one, study=align)
    root = align.folder.parent
    report("llava_align", root=root)
    before = (align.folder / "results.csv").read_bytes()
    assert "by the clock" not in (align.folder / "README.md").read_text()
    note(tmp_path / "runs/studies/llava_align" / FILE, Sweep("micro", 12.0, 2, (*ALL, "gone-seed0")))
    report("llava_align", root=root)
    words = "The grid: 12 minutes by the clock, 15 cells, 2 at once."
    assert words in (align.folder / "README.md").read_text()
    assert (align.folder / "results.csv").read_bytes() == before
    assert read_sweeps(align.folder / FILE) == [Sweep("micro", 12.0, 2, ALL)]
    report("llava_align", source="csv", root=root)
    assert words in (align.folder / "README.md").read_text()


def test_published_cells_are_not_given_the_time_of_runs_here_that_are_none_of_them(align, tmp_path):
    write_csv(align.folder / "results.csv", grid())
    write_sweeps(align.folder / FILE, [Sweep("micro", 30.0, 2, ALL)])
    for one in grid():
        put_run(tmp_path / "runs", one)  # of another configuration
    note(tmp_path / "runs/studies/llava_align" / FILE, Sweep("micro", 1.0, 2, ALL))
    report("llava_align", root=align.folder.parent)
    assert "The grid: 30 minutes by the clock, 15 cells" in (align.folder / "README.md").read_text()
