"""`python -m fastvlm.study`: cells that ran count whatever started them, nothing given is ignored, nothing lost."""

import functools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from fastvlm.study import report as report_module
from fastvlm.study.__main__ import command, main
from fastvlm.study.arms import expand, is_study, load_study, study_names, unreadable
from fastvlm.study.cells import check_one_origin, planned, read_csv, read_runs, write_csv
from fastvlm.study.composed import composed
from fastvlm.study.report import report, report_all, say
from tests.conftest import ROOT
from tests.study.made_cells import cell, configured, grid, put_study


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """llava_align with three arms, without results, and an empty folder of runs."""
    folder = put_study(tmp_path / "studies")
    monkeypatch.setenv("FASTVLM_RUNS", str(tmp_path / "runs"))
    for function in (load_study, report, report_all, study_names, unreadable):
        own = functools.partial(function, root=folder.parent)
        monkeypatch.setattr(f"fastvlm.study.__main__.{function.__name__}", own)
    return folder


def put_run(runs, one, *, study=None, scale="micro", name=None) -> None:
    """The run directory of a cell, as a run of its arm in `study` leaves it."""
    folder = runs / "studies" / "llava_align" / scale / (name or f"{one.arm}-seed{one.seed}")
    folder.mkdir(parents=True)
    about = one.about
    hardware = {key: about[key] for key in ("cpu", "cores", "accelerator", "precision", "threads")}
    made = {"commit": about["commit"], "code": about["code"], "config": about["config"], "hardware": hardware}
    if study is not None:
        made["config"] = composed(study, scale=scale, arm=one.arm).hash(one.seed)
    made["libraries"] = {"torch": about.get("torch", "2.9"), "transformers": "5"}
    results = {"metrics": one.metrics, "cost": {"instruct": one.cost}, "made": made}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text("study: null\n")


def test_cells_of_seeds_beyond_the_grid_count_once_they_ran(studies, tmp_path):
    cells, study = grid(seeds=8), load_study("llava_align", root=studies.parent)
    for one in cells:
        if (one.arm, one.seed) != ("skip", 7):
            put_run(tmp_path / "runs", one, study=study)
    put_run(tmp_path / "runs", cells[0], name="align-seed0-stages.instruct.steps_9")  # more than the arm was changed
    put_run(tmp_path / "runs", cells[0], name="gone-seed0")  # an arm there is no more
    found, missing = read_runs(study, tmp_path / "runs", scale="micro")
    assert len(found) == 23 and missing == []
    made = report("llava_align", root=studies.parent)
    assert len(read_csv(studies / "results.csv")) == 23
    page = (studies / "README.md").read_text()
    assert "n = 7" in page and "n = 8" in page  # paired: skip has no seed 7
    # A grid that was begun says what it still lacks.
    (tmp_path / "runs/studies/llava_align/micro/skip-seed7").mkdir()
    (tmp_path / "runs/studies/llava_align/micro/skip-seed7/config.yaml").write_text("study: null\n")
    (tmp_path / "runs/studies/llava_align/micro/skip-seed9").mkdir()  # as a dry run leaves it
    made = report("llava_align", root=studies.parent)
    assert [str(one) for one in made["missing"]["micro"]] == ["arm=skip seed=7 has not run"]


def test_a_page_is_the_same_to_the_byte_from_runs_and_from_results_csv(studies, tmp_path):
    study = load_study("llava_align", root=studies.parent)
    for one in grid():
        # Three digits of this and of its six in results.csv are not the same.
        put_run(
            tmp_path / "runs", replace(one, metrics=one.metrics | {"test/text_perplexity": 40.2500004}), study=study
        )
    report("llava_align", root=studies.parent)
    from_runs = {path.name: path.read_bytes() for path in studies.iterdir()}
    report("llava_align", source="csv", root=studies.parent)
    assert {path.name: path.read_bytes() for path in studies.iterdir()} == from_runs


def test_a_page_from_results_csv_says_which_cells_of_the_grid_it_lacks(studies):
    write_csv(studies / "results.csv", grid()[:-2])
    made = report("llava_align", source="csv", root=studies.parent)
    lacks = [f"arm=skip_long seed={seed} is not in results.csv" for seed in (3, 4)]
    assert [str(one) for one in made["missing"]["micro"]] == lacks
    assert f"2 planned cells have not run: {'; '.join(lacks)}." in (studies / "README.md").read_text()


def test_more_cells_of_some_arms_never_replace_published_ones_of_others(studies, tmp_path):
    write_csv(studies / "results.csv", grid())
    before = (studies / "results.csv").read_bytes()
    for one in grid(seeds=12):
        if one.arm != "skip":
            put_run(tmp_path / "runs", one, study=load_study("llava_align", root=studies.parent))
    made = report("llava_align", root=studies.parent)
    assert (studies / "results.csv").read_bytes() == before
    assert "keeps its 15 cells; these 24" in made["remarks"][0]


def test_the_catalogue_is_of_published_cells_where_only_some_ran_here(studies, tmp_path):
    study = load_study("llava_align", root=studies.parent)
    write_csv(studies / "results.csv", configured(study, grid()))
    whole = report_all(source="csv", root=studies.parent)
    put_run(tmp_path / "runs", grid()[0], study=study)
    assert report_all(root=studies.parent) == whole
    assert "not run" not in (studies.parent / "README.md").read_text()


@pytest.mark.parametrize("own", [{"precision": "bf16-mixed"}, {"threads": "2"}])
def test_cells_of_another_precision_or_other_threads_never_replace_published_ones(studies, tmp_path, own):
    write_csv(studies / "results.csv", grid())
    before = (studies / "results.csv").read_bytes()
    study = load_study("llava_align", root=studies.parent)
    for one in grid(seeds=6):
        put_run(tmp_path / "runs", replace(one, about=one.about | own), study=study)
    made = report("llava_align", root=studies.parent)
    assert (studies / "results.csv").read_bytes() == before
    assert "keeps its 15 cells; these 18" in made["remarks"][0] and "not in 32-true, 1 thread(s)" in made["remarks"][0]
    (studies / "results.csv").unlink()
    assert report("llava_align", root=studies.parent)["files"][0] == studies / "README.md"


def test_a_diverged_seed_takes_its_own_verdicts_alone_and_is_named(studies):
    cells = grid()
    for one in cells:
        if (one.arm, one.seed) == ("align", 2):
            one.metrics.update({"test/answer_nll": math.nan, "test/ttft_ms": math.nan})
    write_csv(studies / "results.csv", configured(load_study("llava_align", root=studies.parent), cells))
    first, _ = report_all(source="csv", root=studies.parent)
    assert first["verdict"] == "not a finite number"
    page = (studies / "README.md").read_text()
    assert "`align` against `skip`: - (test/answer_nll of arm=align seed=2 is nan)" in page
    assert "(4 of 5 are finite)" in page and "n = 5" in page  # exact match beside it


def test_every_scale_that_ran_has_its_own_verdicts_and_lines_of_the_catalogue(studies):
    large = [cell(arm, seed, nll=0.5 + 0.1 * (arm == "align"), scale="paper") for arm in ("align", "skip", "skip_long")
             for seed in range(5)]  # fmt: skip
    study = load_study("llava_align", root=studies.parent)
    write_csv(studies / "results.csv", configured(study, [*grid(), *large]))
    made = report("llava_align", source="csv", root=studies.parent)
    assert "agrees at equal steps" in made["verdicts"]["micro"][0]
    assert made["verdicts"]["paper"][0].endswith("- disagrees")
    assert [(e["scale"], e["verdict"]) for e in made["entries"]][::2] == [
        ("micro", "agrees at equal steps; disagrees at equal compute"),
        ("paper", "disagrees"),
    ]
    lines = say(made)
    assert lines.index("scale=paper") > lines.index("scale=micro") and lines[0] == "scale=micro"
    report_all(source="csv", root=studies.parent)
    catalogue = (studies.parent / "README.md").read_text()
    assert catalogue.count("| micro |") == catalogue.count("| paper |") == 2
    steps, compute = r"0\.\d+ \[0\.\d+, 0\.\d+\] at equal steps", r"-0\.\d+ \[-0\.\d+, -0\.\d+\] at equal compute"
    assert re.search(rf"\| answer_nll {steps}; {compute} \| agrees at equal steps; disagrees", catalogue)
    assert "at equal compute), 1 agree, 1 disagree, 2 agree on one basis and disagree on another." in catalogue


def test_results_are_written_before_a_claim_that_cannot_be_decided_is_refused(studies, monkeypatch):
    cells = grid()
    for one in cells:
        del one.metrics["test/answer_nll"]
    monkeypatch.setattr(report_module, "read_runs", lambda study, runs, scale: (cells * (scale == "micro"), []))
    with pytest.raises(ValueError, match="test/answer_nll, which no task yielded"):
        report("llava_align", root=studies.parent)
    assert len(read_csv(studies / "results.csv")) == 15


def test_an_arm_without_cells_is_not_run_on_page_and_catalogue(studies):
    write_csv(studies / "results.csv", [one for one in grid() if one.arm != "skip"])
    first, second = report("llava_align", source="csv", root=studies.parent)["entries"]
    assert first["verdict"].startswith("not run at equal steps; disagrees at equal compute")
    assert first["ours"] == "answer_nll -0.0546 [-0.0621, -0.0471] at equal compute"
    assert first["cost"] == "1.00 TFLOP"
    page = (studies / "README.md").read_text()
    assert "`align` against `skip`: - (skip has not run)" in page and "0 steps" not in page
    (studies / "results.csv").unlink()
    write_csv(studies / "results.csv", [one for one in grid() if one.arm == "align"])
    entries = report("llava_align", source="csv", root=studies.parent)["entries"]
    assert {entry["verdict"] for entry in entries} == {"not run"}


def test_a_scale_without_an_arm_of_a_pair_keeps_the_claims_other_pairs_and_names_what_it_lacks(studies):
    file = studies / "study.yaml"
    text = file.read_text()
    short = ", skip_long: [~stages.align, stages.instruct.steps=6880]"
    assert short in text
    file.write_text(text.replace(short, ""))
    claims = yaml.safe_load((studies / "claims.yaml").read_text())
    claims.append(claims[0] | {"claim": "More steps help.", "steps": ["skip_long", "skip"], "compute": []})
    (studies / "claims.yaml").write_text(yaml.safe_dump(claims))
    large = [replace(one, about=one.about | {"scale": "paper"}) for one in grid() if one.arm != "skip_long"]
    write_csv(studies / "results.csv", large)
    made = report("llava_align", source="csv", root=studies.parent)
    assert [entry["scale"] for entry in made["entries"]] == ["paper", "paper"]
    assert made["entries"][0]["verdict"].startswith("agrees at equal steps; no such arm at equal compute")
    page = (studies / "README.md").read_text()
    assert "`align` against `skip`: - (align takes 1.43 times the operations of skip; no arm has as many: skip" in page
    left_out = "- More steps help. (LLaVA-1.5 (arXiv:2310.03744) and what followed it, section 3.3"
    assert page.count(left_out) == 2 and page.count("`skip_long` is not an arm at this scale") == 1  # at micro: not run


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"accelerator": "NVIDIA H200"}, "15 on cpu and 1 on NVIDIA H200, which are no pairs"),
        ({"precision": "bf16-mixed"}, "15 in 32-true and 1 in bf16-mixed"),
        ({"torch": "2.10"}, "15 with torch 2.9 and 1 with torch 2.10"),
    ],
)
def test_cells_of_other_hardware_or_libraries_are_no_pairs(own, words):
    cells = [cell(c.arm, c.seed, nll=0.5, torch="2.9") for c in grid()]
    with pytest.raises(ValueError, match=words + ".*seed=0,1,2,3,4,7 runs again"):
        check_one_origin([*cells, cell("align", 7, nll=0.5, **({"torch": "2.9"} | own))], command="python train.py")
    check_one_origin([*cells, cell("align", 7, nll=0.5)], command="")  # of before libraries were noted


def test_libraries_come_back_from_results_csv_and_older_files_keep_their_form(tmp_path):
    write_csv(tmp_path / "old.csv", grid())
    assert b"torch" not in (tmp_path / "old.csv").read_bytes()
    write_csv(tmp_path / "new.csv", [cell("align", 0, nll=0.5, torch="2.9", transformers="5")])
    assert read_csv(tmp_path / "new.csv")[0].about["torch"] == "2.9"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scale=paper", "report=llava_align"], "scale= goes with cells=.*every scale"),
        (["report=all", "from=mlflow"], "name one study with from=mlflow"),
        (["report=llava_align", "uri=x"], "goes with from=mlflow"),
        (["cells=llava_align", "from=csv"], "from= goes with report="),
        (["cells=llava_align", "report=llava_align"], "two commands"),
        (["report=llava_align", "report=all"], "stands twice"),
        (["reports=llava_align"], "did you mean report="),
        (["report=llava_algn"], "did you mean llava_align"),
        (["report=llava_align", "from=cvs"], "from=cvs is not one of auto, runs, csv, mlflow"),
        (["cells=llava_align", "scale=big"], "scale=big is not one of micro, paper"),
        (["cells"], "cells is not one of"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(studies, arguments, words):
    with pytest.raises(ValueError, match=words):
        main(arguments)


def test_the_command_reports_lists_studies_and_cells(studies, tmp_path, capsys):
    for one in grid():
        if one.seed < 3:
            put_run(tmp_path / "runs", one, study=load_study("llava_align", root=studies.parent))
    main(["report=llava_align"])
    out = capsys.readouterr().out
    assert "scale=micro" in out and "not resolved (about 5 seeds would tell)" in out and "README.md" in out
    main([])
    assert re.search(r"llava_align +9 of +15, +9 published", capsys.readouterr().out)
    main(["cells=llava_align"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 15 and sum(row.endswith("  done") for row in rows) == 9
    assert "python train.py experiment=llava_align scale=micro arm=skip seed=4   # has not run" in "\n".join(rows)
    main(["report=all", "from=csv"])
    assert (studies.parent / "README.md").exists()
    main(["--help"])
    assert "from=runs|csv|mlflow|auto" in capsys.readouterr().out


def put_broken(studies) -> None:
    """Beside the study another, whose file is no YAML from its third line on."""
    (studies.parent / "bent").mkdir()
    (studies.parent / "bent" / "study.yaml").write_text("study:\n  name: bent\n  micro: [a, b\n")


def test_a_study_that_cannot_be_read_is_named_and_stops_no_other(studies, capsys, monkeypatch):
    write_csv(studies / "results.csv", grid())
    put_broken(studies)
    bent = "bent/study.yaml, line 4: expected ',' or ']'"
    with pytest.raises(ValueError, match=bent):
        main([])
    assert "llava_align" in capsys.readouterr().out
    with pytest.raises(ValueError, match=rf"README.md is without these: .*{bent}"):
        main(["report=all", "from=csv"])
    assert "(llava_align/README.md)" in (studies.parent / "README.md").read_text()
    main(["report=llava_align", "from=csv"])
    with pytest.raises(ValueError, match="llava_algn is not a study; did you mean llava_align"):
        main(["report=llava_algn"])
    with pytest.raises(ValueError, match=bent):
        main(["report=bent"])
    monkeypatch.setattr("fastvlm.study.arms.is_study", functools.partial(is_study, root=studies.parent))
    for arguments in (["experiment=bent"], ["experiment=bent", "arm=a"], ["-m", "experiment=bent"]):
        with pytest.raises(ValueError, match=bent):
            expand(arguments)
    assert expand(["experiment=bnt"]) == ["experiment=bnt"]  # told by Hydra's own search


def test_a_study_whose_arms_cannot_be_read_is_left_out_of_the_list_and_named(studies, capsys):
    other = shutil.copytree(studies, studies.parent / "other")
    text = (studies / "study.yaml").read_text().replace("llava_align", "other")
    (other / "study.yaml").write_text(text.replace("align: []", "align: 5"))
    with pytest.raises(ValueError, match="other/study.yaml: study.micro.arms.align=5 must be a list of overrides"):
        main([])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 and rows[0].startswith("llava_align")


def test_the_module_says_a_mistake_in_one_line():
    command = [sys.executable, "-m", "fastvlm.study", "report=nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing is not a study")
    assert "\n" not in done.stderr[:-1]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted: every file is as it was or as it is to be; the same command makes"),
        (PermissionError(13, "Permission denied", "README.md"), 2, "error: [Errno 13] Permission denied: 'README.md'"),
    ],
)
def test_what_ends_the_command_is_one_line(monkeypatch, capsys, error, status, words):
    def ended(**options):
        raise error

    monkeypatch.setattr("fastvlm.study.__main__.report_all", ended)
    assert command(["report=all"]) == status
    told = capsys.readouterr().err.strip()
    assert told.startswith(words) and "\n" not in told


def test_results_that_cannot_be_written_whole_stay_as_they_were(tmp_path):
    write_csv(tmp_path / "results.csv", grid())
    before = (tmp_path / "results.csv").read_bytes()
    odd = replace(grid()[0], about=grid()[0].about | {"seed": "ten"})
    with pytest.raises(ValueError, match="invalid literal"):
        write_csv(tmp_path / "results.csv", [*grid()[:3], odd])
    assert (tmp_path / "results.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def deltas(text: str) -> dict[str, int]:
    """Scale -> lines of 120 columns that its `all` and `arms` take; headings and comments are none."""
    counts, scale = {}, None
    for line in text.splitlines():
        if match := re.match(r"  (micro|paper):(.*)", line):
            scale = match[1]
            counts[scale] = 0
        elif not line.startswith("   "):
            scale = None
        plain = line.split(" #")[0].strip()
        if scale and plain and not re.fullmatch(r"(micro|paper|arms):( &\w+)?|#.*", plain):
            counts[scale] += -(-len(plain) // 120)
    return counts


@pytest.mark.parametrize("name", study_names())
def test_a_study_is_at_most_twenty_lines_of_deltas_a_scale(name):
    counts = deltas((ROOT / "experiments" / name / "study.yaml").read_text())
    assert counts.keys() == load_study(name).arms.keys() and min(counts.values()) > 0
    assert max(counts.values()) <= 20, counts
    assert planned(load_study(name), scale="micro")


def test_a_long_line_counts_as_the_lines_it_would_take():
    text = "study:\n  micro:\n    # why\n    arms:\n      a: [" + "x" * 300 + "]\n      b: []\nhydra: {}\n"
    assert deltas(text) == {"micro": 4}
