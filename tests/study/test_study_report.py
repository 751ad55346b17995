"""From rows to a page: it says what the rows say, the same rows make the same bytes, and faults are named."""

import shutil

import numpy as np
import pytest

from fastvlm.study import report as report_module
from fastvlm.study.arms import load_study
from fastvlm.study.cells import ABOUT, COST, Cell, check_one_origin, decide_claim, read_csv, write_csv
from fastvlm.study.claims import Claim, load_claims
from fastvlm.study.plots import pareto_front
from fastvlm.study.readme import amount, headline, number
from fastvlm.study.report import report, report_all
from tests.conftest import ROOT


def cell(arm: str, seed: int, *, nll: float, flops: float = 1e12, code="c0de", commit="abc123456") -> Cell:
    about = dict.fromkeys(ABOUT, "1") | {"scale": "micro", "arm": arm, "seed": str(seed)}
    about |= {"code": code, "commit": commit}
    about |= {"cpu": "a CPU", "accelerator": "cpu", "precision": "32-true"}
    metrics = {"test/answer_nll": nll, "test/exact_match/mean": 1 - nll, "test/text_perplexity": 40.0}
    return Cell(about, dict.fromkeys(COST, 10.0) | {"flops": flops}, metrics | {"test/ttft_ms": 9.0})


def grid(*, code="c0de", seeds=5) -> list[Cell]:
    noise = np.random.default_rng(0).normal(0, 0.005, (3, seeds))
    levels = {"align": (0.6, 1e12), "skip": (0.7, 0.7e12), "skip_long": (0.55, 1.01e12)}
    return [
        cell(arm, seed, nll=level + noise[row, seed], flops=flops, code=code)
        for row, (arm, (level, flops)) in enumerate(levels.items())
        for seed in range(seeds)
    ]


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """llava_align alone, in a folder of its own, without results."""
    folder = tmp_path / "studies" / "llava_align"
    folder.mkdir(parents=True)
    for name in ("study.yaml", "claims.yaml", "paper.csv"):
        shutil.copyfile(ROOT / "experiments" / "llava_align" / name, folder / name)
    monkeypatch.setenv("FASTVLM_RUNS", str(tmp_path / "runs"))
    return folder.parent


def test_a_page_is_made_again_from_results_csv_to_the_byte(studies):
    folder = studies / "llava_align"
    write_csv(folder / "results.csv", grid())
    rows = (folder / "results.csv").read_bytes()
    made = report("llava_align", source="csv", root=studies)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    report("llava_align", source="csv", root=studies)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first and first["results.csv"] == rows
    assert made["verdicts"][0].endswith("agrees at equal steps; disagrees at equal compute")
    page = first["README.md"].decode()
    assert "62.28 | paper" in page and "![llava_align](micro.svg)" in page and "a CPU" in page
    catalogue = report_all(source="csv", root=studies)
    assert catalogue[0]["verdict"].startswith("agrees at equal steps") and (studies / "README.md").exists()


def test_rows_come_back_from_results_csv_whatever_their_order(tmp_path):
    cells = grid()
    write_csv(tmp_path / "one.csv", cells)
    write_csv(tmp_path / "two.csv", cells[::-1])
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    back = read_csv(tmp_path / "one.csv", scale="micro")
    assert sorted((c.arm, c.seed) for c in back) == sorted((c.arm, c.seed) for c in cells)
    assert read_csv(tmp_path / "one.csv", scale="paper") == []


def test_with_fewer_than_five_seeds_no_page_says_agrees(studies):
    write_csv(studies / "llava_align" / "results.csv", grid(seeds=4))
    made = report("llava_align", source="csv", root=studies)
    assert all(line.endswith("not resolved") for line in made["verdicts"])
    page = (studies / "llava_align" / "README.md").read_text()
    assert "**agrees**" not in page and "about 5 seeds would tell" in page


def test_a_part_of_the_cells_never_replaces_the_whole(studies, monkeypatch):
    file = studies / "llava_align" / "results.csv"
    write_csv(file, grid())
    before = file.read_bytes()
    part = {"micro": grid()[:3], "paper": []}
    monkeypatch.setattr(report_module, "read_runs", lambda study, runs, scale: (part[scale], []))
    made = report("llava_align", root=studies)
    assert file.read_bytes() == before and "keeps its 15 cells" in made["remarks"][0]
    assert all("runs/studies/llava_align" in str(path) for path in made["files"])


def test_cells_of_two_versions_of_the_code_are_refused_with_both_commits():
    mixed = grid() + [cell("align", 9, nll=0.5, code="other", commit="fedcba987")]
    with pytest.raises(ValueError, match="15 of commit abc123456 and 1 of commit fedcba987.*run it again"):
        check_one_origin(mixed, command="run it again")
    # Another commit with the same code is the same origin.
    check_one_origin(grid() + [cell("align", 9, nll=0.5, commit="fedcba987")], command="")


def test_a_metric_that_no_task_yields_is_named_with_the_nearest():
    claim = Claim("x", "p", "t", "test/answer_nl", "lower", ["align", "skip"])
    with pytest.raises(ValueError, match="test/answer_nl, which no task yielded; did you mean test/answer_nll"):
        decide_claim(claim, grid())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps: [align, skp]", "there is no arm skp.*did you mean skip"),
        ("steps: [align]", "steps names two arms"),
        ("direction: better", "direction=better is none of higher, lower, same"),
        ("direction: same", "needs a margin above 0"),
        ("colour: red", "colour"),
        ("factor: -1", "factor=-1 must be above 0"),
    ],
)
def test_a_wrong_claim_is_one_line_that_says_where(studies, change, words):
    entry = {"claim": "x", "paper": "p", "table": "t", "metric": "m", "direction": "lower", "steps": "[align, skip]"}
    key, value = change.split(": ")
    entry[key] = value
    text = "- " + "\n  ".join(f"{k}: {v}" for k, v in entry.items())
    (studies / "llava_align" / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        load_claims(load_study("llava_align", root=studies))
    assert "claim 1" in str(error.value) and "\n" not in str(error.value)


def test_equal_compute_is_said_only_of_arms_with_about_as_many_operations():
    lower = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"])
    steps, compute = decide_claim(lower, grid())
    assert steps.verdict.outcome == "agrees" and compute.verdict is None
    assert "1.43 times the operations" in compute.why
    assert headline([steps, compute]) == "agrees at equal steps; no such arm at equal compute"
    with_arm = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"], compute=["align", "skip_long"])
    assert decide_claim(with_arm, grid())[1].verdict.outcome == "disagrees"


def test_a_claim_about_a_factor_does_not_depend_on_how_fast_the_machine_is():
    claim = Claim("x", "p", "t", "test/ttft_ms", "lower", ["align", "skip"], factor=2.0)

    def timed(speed: float, times: float) -> list[Cell]:
        cells = [cell(arm, seed, nll=0.5) for arm in ("align", "skip") for seed in range(5)]
        for one in cells:
            one.metrics["test/ttft_ms"] = speed * (1 + 0.02 * one.seed) * (times if one.arm == "skip" else 1)
        return cells

    for speed in (1.0, 1000.0):
        (more,) = decide_claim(claim, timed(speed, 2.5))  # at equal steps alone: a cost has no equal compute
        (less,) = decide_claim(claim, timed(speed, 1.5))
        assert headline([more]) == "agrees" and headline([less]) == "disagrees"
        assert amount(more).startswith("2.50 times [2.50, 2.50]")
    assert decide_claim(claim, timed(1.0, 0.5))[0].verdict.outcome == "disagrees"
    with pytest.raises(ValueError, match="is about a factor, but test/ttft_ms is 0 in a cell"):
        decide_claim(claim, timed(0.0, 2.0))


def test_a_metric_beside_speaks_for_the_claim_on_its_own_good_side():
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"], beside=["test/exact_match/mean"])
    beside = decide_claim(claim, grid())[2]
    assert beside.metric == "test/exact_match/mean" and beside.verdict.mean > 0


def test_a_law_is_decided_on_where_the_metric_is_best_not_on_how_good_it_is():
    rates = {1: 1e-3, 2: 2e-3, 4: 4e-3, 8: 8e-3}
    sets = [{f"{size}_{n}": rate for n, rate in rates.items()} for size in ("wide", "narrow")]

    def bowl(n: int, best: float) -> float:
        return 1 + (np.log2(n) - best) ** 2

    cells = [cell(f"wide_{n}", s, nll=bowl(n, 1.0 + 0.01 * s)) for n in rates for s in range(5)]
    cells += [cell(f"narrow_{n}", s, nll=2 + bowl(n, 2.0 - 0.01 * s)) for n in rates for s in range(5)]
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["wide_1", "narrow_1"], optimum=sets)
    steps, compute = decide_claim(claim, cells)
    assert steps.verdict.outcome == "agrees" and steps.verdict.mean == pytest.approx(1 - 0.04)
    assert compute.verdict is None


def test_the_pareto_front_keeps_what_nothing_beats():
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.9), (3.0, 0.9), (4.0, 0.95)]
    assert pareto_front(points) == [(1.0, 0.5), (2.0, 0.9), (4.0, 0.95)]


def test_numbers_keep_three_digits():
    assert [number(x) for x in (0.12345, 12.345, 1234.5, 0.0, 1.5e12)] == ["0.123", "12.3", "1234", "0.00", "1.50e+12"]
