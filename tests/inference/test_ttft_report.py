"""Tables of `benchmarks/ttft.py` from rows of its own form, those of older files among them."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # last: it holds a data.py
from ttft import missing, parse  # noqa: E402
from ttft_report import draw, tabulate, write_csv  # noqa: E402

PLACE = {"machine": "a CPU", "device": "cpu", "threads": 1, "time": "cpu"}


def row(name, mode, encoding, prefill, *, error=(), old=False):
    """Seconds of each repeat of the two long parts; the short ones take 10 ms."""
    times = {"preprocessing": [0.01], "encoding": encoding, "projection": [0.01], "prefill": prefill}
    middle = lambda values: sorted(values)[len(values) // 2]
    seconds = {part: middle(values) for part, values in times.items()}
    made = {"row": name, "mode": mode, "tokens": 4, "positions": 36, "ttft": sum(seconds.values()), **PLACE}
    made |= {"seconds": seconds | {"first decode": 0.1}, "weight_bytes": 10**9, "peak_bytes": 2 * 10**9}
    made |= {"unit_seconds": [0.08, 0.08], "load": 1.0, "levers": [] if mode in ("eager", "none") else mode.split("+")}
    made |= {"flops": {"encoding": 10**9}, "error": dict(zip(("visual tokens", "logits"), error))}
    if not old:
        made["spread"] = {part: [min(values), max(values)] for part, values in times.items()}
        made["repeats"] = {part: len(values) for part, values in times.items()}
    return made


ROWS = [
    row("fastvlm-512", "eager", [0.98, 1.08, 1.18], [0.9, 0.9, 1.0]),
    row("fastvlm-512", "bf16", [0.38, 0.48, 0.58], [0.5, 0.5, 0.6], error=(0.004, 0.02)),
    row("fastvlm-512", "levers", [0.18], [0.3], error=(0.01, 0.05)),
]


def line(table, start):
    (found,) = (cells for text in table.splitlines() if (cells := text.strip("| ").split(" | "))[: len(start)] == start)
    return [cell.strip() for cell in found]


def test_every_row_shows_its_repeats_and_the_sum_of_its_fastest_and_slowest_parts():
    table = tabulate(ROWS)
    assert line(table, ["fastvlm-512", "eager"])[7:10] == ["2000", "1900-2200", "3, 3"]
    assert line(table, ["fastvlm-512", "levers"])[7:10] == ["500", "", "1, 1"], "one timing has no spread"


def test_each_lever_stands_against_the_same_model_eager_with_spread_and_error():
    table = tabulate(ROWS)
    # 2.0 over 1.0 s; 1.9 over 1.2 at the least, 2.2 over 0.9 at the most.
    assert line(table, ["bf16", ""])[2:] == ["2.00 (1.58-2.44)", "2.25", "1.80", "1.00", "1.00", "0.004, 0.020"]
    assert line(table, ["levers", "levers"])[2] == "4.00"
    assert "ratio of TTFT" not in table, "rivals are not in this file"


def test_rivals_have_a_spread_and_rows_of_older_files_none(tmp_path):
    rows = [row("clip-l-336", "eager", [3.9, 3.98, 4.1], [4.0, 4.0, 4.0], old=True), ROWS[0]]
    old = tabulate(rows)
    assert line(old, ["CLIP ViT-L/14-336 eager / FastVLM 512 eager"])[1] == "4.00"
    assert line(old, ["clip-l-336", "eager"])[7:10] == ["8000", "", ""] and "fastvlm-512 with" not in old
    rows[0] = row("clip-l-336", "eager", [3.88, 3.98, 4.38], [3.9, 4.0, 4.4])
    assert line(tabulate(rows), ["CLIP ViT-L/14-336 eager / FastVLM 512 eager"])[1] == "4.00 (3.55-4.63)"


def test_a_file_of_single_levers_gets_its_csv_and_one_without_a_mode_to_plot_no_picture(tmp_path):
    write_csv(ROWS, tmp_path / "a.csv")
    first, _, last = csv.DictReader((tmp_path / "a.csv").open())
    assert (first["ttft_min"], first["ttft_max"], first["repeats"]) == ("1.90000", "2.20000", "3")
    assert (last["ttft_min"], last["repeats"]) == ("", "1")
    draw([ROWS[1]], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_what_is_measured_with_these_threads_on_this_device_is_not_measured_again():
    options = parse(["only=fastvlm-512,fastvlm-1024"])
    wanted = [(name, mode) for name in ("fastvlm-512", "fastvlm-1024") for mode in ("eager", "levers")]
    assert missing(wanted, ROWS, options) == [("fastvlm-1024", "eager"), ("fastvlm-1024", "levers")]
    assert missing(wanted, ROWS, options | {"threads": "2"}) == wanted
    assert missing(wanted, ROWS, options | {"device": "cuda"}) == wanted


@pytest.mark.parametrize("wrong", ["flops=no", "report=1", "only=fastvlm", "modes=bf61"])
def test_a_wrong_option_is_said_before_anything_is_measured(wrong):
    with pytest.raises(ValueError, match=wrong.partition("=")[2]):
        parse([wrong])
