"""From rows to a page: it says what the rows say, the same rows make the same bytes, and faults are named."""

from dataclasses import replace

import pytest

from fastvlm.study import report as report_module
from fastvlm.study.arms import load_study
from fastvlm.study.cells import check_one_origin, read_csv, write_csv
from fastvlm.study.claims import load_claims, load_figures
from fastvlm.study.grid import Sweep
from fastvlm.study.plots import _pareto, make_plots, most_alike, pareto_front
from fastvlm.study.readme import arms_table, caption, number
from fastvlm.study.report import report, report_all
from tests.study.made_cells import cell, configured, grid, put_study


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """llava_align with three arms, in a folder of its own, without results."""
    folder = put_study(tmp_path / "studies")
    monkeypatch.setenv("FASTVLM_RUNS", str(tmp_path / "runs"))
    return folder.parent


def test_a_page_is_made_again_from_results_csv_to_the_byte(studies):
    folder = studies / "llava_align"
    write_csv(folder / "results.csv", configured(load_study("llava_align", root=studies), grid()))
    rows = (folder / "results.csv").read_bytes()
    made = report("llava_align", source="csv", root=studies)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    report("llava_align", source="csv", root=studies)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first and first["results.csv"] == rows
    assert made["verdicts"]["micro"][0].endswith("agrees at equal steps; disagrees at equal compute")
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
    cells = configured(load_study("llava_align", root=studies), grid(seeds=4))
    write_csv(studies / "llava_align" / "results.csv", cells)
    made = report("llava_align", source="csv", root=studies)
    assert all(line.endswith("not resolved (about 5 seeds would tell)") for line in made["verdicts"]["micro"])
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
    with pytest.raises(ValueError, match="15 of commit abc123456 and 1 of commit fedcba987.*run it seed=0,1,2,3,4,9"):
        check_one_origin(mixed, command="run it")
    # Another commit with the same code is the same origin.
    check_one_origin(grid() + [cell("align", 9, nll=0.5, commit="fedcba987")], command="")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps: [align, skp]", "there is no arm skp.*did you mean skip"),
        ("steps: [align]", "steps names two arms"),
        ("direction: better", "direction=better is not one of higher, lower, same"),
        ("direction: same", "needs a margin above 0"),
        ("colour: red", "colour"),
        ("factor: -1", "factor=-1 must be above 0"),
    ],
)
def test_a_wrong_claim_is_one_line_that_says_where(studies, change, words):
    entry = {"claim": "x", "paper": "p", "table": "t", "metric": "test/answer_nll", "direction": "lower"}
    entry["steps"] = "[align, skip]"
    key, value = change.split(": ")
    entry[key] = value
    text = "- " + "\n  ".join(f"{k}: {v}" for k, v in entry.items())
    (studies / "llava_align" / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        load_claims(load_study("llava_align", root=studies))
    assert "claim 1" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "claims.yaml is empty: a study without a claim decides nothing"),
        ("claim: x\n", "claims.yaml is not a list; a claim begins with `- claim: `"),
        ("- x\n", "claims.yaml, claim 1: x has no keys"),
        ("- claim: a: b\n", "claims.yaml, line 1: mapping values are not allowed here"),
        ("- claim: 'x\n", "claims.yaml, line 2: found unexpected end of stream"),
    ],
)
def test_a_file_of_claims_that_is_none_is_one_line_that_says_where(studies, text, words):
    (studies / "llava_align" / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        load_claims(load_study("llava_align", root=studies))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "key,table,setting,metric,worth,status\n",
            "its columns are .*worth.*, not key, table, setting, metric, value",
        ),
        ("key,table,setting,metric,value,status,more\n", "its columns are .*, more, not key"),
        ("key,table,setting,metric,value,status\na,b,c\n", "paper.csv, line 2: not 6 values"),
        ("key,table,setting,metric,value,status\na,b,c,d,1,2,paper\n", "line 2: not 6 values; quote those with commas"),
        ("", "its columns are , not key"),
    ],
)
def test_figures_in_other_columns_are_one_line_that_says_which(studies, text, words):
    (studies / "llava_align" / "paper.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_figures(studies / "llava_align")


def bent(lines: list[str], kind: str) -> list[str]:
    first = lines[1].split(",")
    of_kind = {
        "short": [",".join(first[:-1])],
        "long": [",".join([*first, "1"])],
        "twice": [lines[1], lines[1]],
        "word": [",".join([*first[:-1], "fast"])],
        "seed": [",".join([*first[:2], "x", *first[3:]])],
    }
    return [lines[0], *of_kind[kind], *lines[2:]]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("short", "line 2 has not the 20 values of its header"),
        ("long", "line 2 has not the 20 values of its header"),
        ("twice", "line 3: scale=micro arm=align seed=0 stands twice"),
        ("word", "line 2: could not convert string to float: 'fast'"),
        ("seed", "line 2: invalid literal for int.*'x'"),
    ],
)
def test_a_row_of_results_that_is_none_is_named_with_what_to_do(tmp_path, kind, words):
    file = tmp_path / "results.csv"
    write_csv(file, grid())
    file.write_text("\n".join(bent(file.read_text().splitlines(), kind)) + "\n")
    with pytest.raises(ValueError, match=f"results.csv, {words}; restore the file, or remove it"):
        read_csv(file)


def test_plots_say_which_way_is_better_and_how_sure_a_point_is(studies, tmp_path):
    study = load_study("llava_align", root=studies)
    claims = [replace(claim, beside=["test/ttft_ms"]) for claim in load_claims(study)]
    names = make_plots(study, grid(), claims, folder=tmp_path, scale="micro")
    assert names == ["micro.svg", "micro_pareto.svg"]
    arms, pareto = ((tmp_path / name).read_text() for name in names)
    for words in ("answer NLL", "(lower is better)", "(higher is better)", "skip_long"):
        assert words in arms
    assert "time to first token, ms (lower is better)" in pareto and "exact match (higher is better)" in pareto
    one_seed = make_plots(study, grid(seeds=1), claims, folder=tmp_path, scale="micro")
    bars = "#9db4e4"
    assert pareto.count(bars) == 2 * 3 and bars not in (tmp_path / one_seed[1]).read_text()
    (said,) = caption(names)
    assert (
        "bars the 95% interval of each mean" in said and "line joins" in said and "line joins" not in caption(["a"])[0]
    )


def test_seconds_of_an_arm_that_another_sweep_trained_are_marked(studies):
    study, cells = load_study("llava_align", root=studies), grid()
    names = {arm: tuple(f"{c.arm}-seed{c.seed}" for c in cells if c.arm == arm) for arm in study.arms["micro"]}
    sweeps = [Sweep("micro", 20.0, 2, names["align"] + names["skip"]), Sweep("micro", 9.0, 2, names["skip_long"])]
    table = arms_table(study, cells, load_claims(study), scale="micro", sweeps=sweeps)
    assert [line.startswith("| `skip_long`") for line in table if line.endswith("* |")] == [True]
    assert table[-1].startswith("\\* Not trained in the same sweep as most arms")
    assert "*" not in "".join(arms_table(study, cells, load_claims(study), scale="micro"))


def test_the_front_is_of_arms_that_took_as_many_steps():
    steps = {"t16_425": 485.0, "t16": 210.0, "t64": 212.0, "t256": 210.0, "t64_423": 483.0, "t144_292": 352.0}
    assert most_alike(steps) == ["t16", "t64", "t256"]
    assert most_alike({"one": 210.0, "other": 300.0}) == ["one"]


def test_the_front_leaves_out_an_arm_that_trained_longer_however_good_it_is():
    import matplotlib.pyplot as plt

    cells = [cell(arm, seed, nll=0.5) for arm in ("align", "skip", "skip_long") for seed in range(2)]
    places = {"align": (2.0, 0.5), "skip": (1.0, 0.4), "skip_long": (0.5, 0.9)}
    for one in cells:
        one.metrics.update(dict(zip(("test/ttft_ms", "test/exact_match/mean"), places[one.arm])))
        one.cost["steps"] = 900.0 if one.arm == "skip_long" else 210.0
    figure = _pareto(plt, list(places), cells)
    (front,) = [line for line in figure.axes[0].lines if line.get_color() == "#d9680f"]
    assert list(map(tuple, front.get_xydata())) == [places["skip"], places["align"]]
    plt.close(figure)


def test_the_pareto_front_keeps_what_nothing_beats():
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.9), (3.0, 0.9), (4.0, 0.95)]
    assert pareto_front(points) == [(1.0, 0.5), (2.0, 0.9), (4.0, 0.95)]


def test_numbers_keep_three_digits():
    assert [number(x) for x in (0.12345, 12.345, 1234.5, 0.0, 1.5e12)] == ["0.123", "12.3", "1234", "0.00", "1.50e+12"]
