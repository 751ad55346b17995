"""The page about a run, made from a folder as a real run leaves it, and from folders with pieces missing."""

import html.parser
import json
import math
import random
import re

import pytest
from PIL import Image, ImageDraw

from fastvlm.report import write_report
from fastvlm.report.charts import Line, line_chart, smooth, thin, ticks
from fastvlm.report.results import choose_predictions, duration

TYPES = {"reading digits": 0.91, "chart: which is highest": 0.62, "chart: how many": 0.44, "yes or no": 0.83}
SOURCES = {"captions": 0.35, "interleaved": 0.15, "text": 0.1, "questions": 0.25, "charts": 0.1, "instruct": 0.05}


def draw_digits(path, rng):
    image = Image.new("RGB", (96, 96), (rng.randrange(180, 250),) * 3)
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = rng.randrange(5, 60), rng.randrange(5, 60)
        draw.ellipse((x, y, x + 26, y + 30), outline=(20, 20, rng.randrange(60, 180)), width=5)
    image.save(path)


def write_stage(folder, *, name, steps, parent, sources, start, rng):
    """metrics.jsonl, freezing.json, manifest, samples and provenance of a stage that trained."""
    folder.mkdir(parents=True)
    lines, seconds = [], 0.0
    for step in [1, *range(20, steps + 1, 20)]:
        seconds += 0.9 + rng.random() * 0.1
        loss = start * (0.35 + 0.65 * math.exp(-step / (steps / 4))) + rng.gauss(0, 0.06)
        record = {"step": step, "time": 1.7e9 + seconds, "stage": name, "train/loss": loss, "train/seconds": seconds}
        record |= {f"train/loss/{s}": loss * (0.7 + 0.1 * i) for i, s in enumerate(sources)}
        whole = sum(SOURCES[s] for s in sources)
        for s in sources:
            record[f"train/share_target/{s}"] = SOURCES[s] / whole
            for kind in ("share", "share_samples", "share_tokens", "share_answer_tokens"):
                record[f"train/{kind}/{s}"] = 1 / len(sources) if kind == "share_tokens" else SOURCES[s] / whole
        record |= {
            "train/tokens_per_second": 13_000.0,
            "train/text_tokens_per_second": 9_100 + rng.random() * 900,
            "train/image_tokens_per_second": 3_900.0,
            "train/samples_per_second": 212.0,
            "train/padding": 0.021,
            "train/data_wait": 0.013,
            "train/memory_gib": 1.31,
            "train/grad_norm": 1.1 + rng.random(),
            "train/skipped": 0.0,
            "train/lr/projector": 1e-3 * (1 - step / steps) + 1e-5,
            "train/grad_norm/projector": 0.9 + rng.random(),
        }
        lines.append(record)
        if step % (steps // 4) == 0:
            lines.append({"step": step, "time": 1.7e9 + seconds, "stage": name, "val/loss": loss * 1.06})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = [
        ("encoder", 412_304, False, None, 61),
        ("projector", 49_408, True, 1e-3, 4),
        ("llm", 2_106_880, False, None, 75),
    ]
    rows = [
        {"part": p, "parameters": n, "trainable": t, "lr": r, "changed": k if t else 0, "unchanged": 0 if t else k}
        for p, n, t, r, k in parts
    ]
    (folder / "freezing.json").write_text(json.dumps({"stage": name, "rows": rows}))
    (folder / "handoff").mkdir()
    manifest = {
        "stage": name,
        "hash": f"{rng.getrandbits(48):012x}",
        "parent": {"llm": {"hash": parent, "folder": "x"}} if parent else {},
        "config_hash": f"{rng.getrandbits(64):016x}",
        "tokenizer": "9c1e5d2f6a7b8c90",
        "commit": "3f9d1c77a0b84c55",
        "created": "2026-11-02T14:21:07+0000",
        "components": {"projector": {"file": "projector.safetensors", "sha256": "ab" * 32, "parameters": 49_408}},
        "metrics": {"val/loss": 1.2},
    }
    (folder / "handoff" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "samples").mkdir()
    draw_digits(folder / "samples" / f"step-{steps:06d}.png", rng)
    provenance = {
        "created": "2026-11-02T14:20:01+0000",
        "command": "python train.py pipeline=three_stage seed=0",
        "git": {"commit": "3f9d1c77a0b84c55a1b2c3d4e5f60718293a4b5c", "dirty": True, "changed": []},
        "seeds": {"seed": 0},
        "versions": {"python": "3.11.9", "torch": "2.15.0", "lightning": "2.6.6"},
        "hardware": {"cpu": "Example CPU @ 2.4 GHz", "cores": 2, "memory_gib": 15.6, "gpus": []},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return manifest["hash"]


def write_run(folder):
    """A finished run of three stages; returns what `write_report` needs besides its folder."""
    rng = random.Random(0)
    run, stages, parent = folder / "runs" / "demo", [], None
    plan = [
        ("align", 400, ["captions"], 3.4),
        ("dense", 800, list(SOURCES)[:3], 2.6),
        ("instruct", 600, list(SOURCES), 2.1),
    ]
    for name, steps, sources, start in plan:
        path = folder / "runs" / "stages" / f"{name}-0123456789ab"
        parent = write_stage(path, name=name, steps=steps, parent=parent, sources=sources, start=start, rng=rng)
        stages.append({"name": name, "dir": path})
    (run / "predictions").mkdir(parents=True)
    table, predictions = [], []
    for kind, score in TYPES.items():
        table.append(
            {
                "type": kind,
                "mean": False,
                "n": 250,
                "exact_match": score,
                "nll": 0.6,
                "nll_swapped": 1.94,
                "low": score - 0.05,
                "high": score + 0.04,
            }
            | {"removed": score * 0.45, "swapped": score * 0.4, "majority": 0.5 if kind == "yes or no" else 0.14}
        )
        for i in range(6):
            name = f"{len(predictions):03d}.png"
            draw_digits(run / "predictions" / name, rng)
            right = i % 2 == 0
            predictions.append({
                "key": f"q-{len(predictions)}", "type": kind, "correct": right, "reference": "7 3 9",
                "prompt": "<image>Which digits does the picture show, from left to right?",
                "prediction_removed": "1", "prediction_swapped": "4 4",
                "prediction": "7 3 9" if right else "7 3 <script>alert(1)</script>", "image": f"predictions/{name}",
            })  # fmt: skip
    results = {
        "metrics": {"val/accuracy": 0.7, "val/nll": 0.61},
        "table": table,
        "text_perplexity": {"before": 38.4, "after": 39.1},
        "predictions": predictions,
        "seconds": {"evaluation": 9.4, "data": 6.1},
    }
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text(
        "seed: 0\npipeline: three_stage\nstages:\n  align:\n    trainable: {projector: 1e-3}\n"
    )
    return run, stages


class Reader(html.parser.HTMLParser):
    """Collects addresses, text and the balance of tags."""

    EMPTY = {"meta", "link", "img", "br"}  # and what closes itself

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "xlink:href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def read_page(path):
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert reader.open == []
    return reader, " ".join(reader.text)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run, stages = write_run(tmp_path_factory.mktemp("report"))
    return write_report(run, title="FastVLM in three stages", stages=stages, summary="Two cores, no download.")


def test_the_page_parses_and_fetches_nothing(page):
    reader, _ = read_page(page)
    assert page.name == "report.html"
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    source = page.read_text()
    assert not re.search(r"https?://|@import|url\(", source) and "script" not in reader.tags
    assert page.stat().st_size < 1_000_000


def test_text_from_the_model_is_never_markup(page):
    _, text = read_page(page)
    assert "<script>alert(1)</script>" in text


def test_the_page_shows_results_beside_blind_baselines_and_perplexity(page):
    _, text = read_page(page)
    for wanted in (
        "reading digits",
        "91.0 %",
        "86.0 – 95.0",
        "removed",
        "majority",
        "38.40",
        "39.10",
        "+1.8%",
        "70.0 %",
        "1.94",
    ):
        assert wanted in text, wanted


def test_the_page_shows_each_stages_curves_shares_proof_and_handoff(page):
    reader, text = read_page(page)
    assert reader.tags.count("svg") == 6 + 5  # loss beside sources or rates; norms (and rates) folded
    for wanted in ("align", "dense", "instruct", "held out", "136 frozen tensors verified", "4 of 4 tensors moved"):
        assert wanted in text, wanted
    for wanted in (
        "9c1e5d2f6a7b",
        "ab" * 32,
        "python train.py pipeline=three_stage",
        "with local changes",
        "three_stage",
    ):
        assert wanted in text, wanted


def test_missing_pieces_are_named(tmp_path):
    empty = tmp_path / "stages" / "align-0"
    empty.mkdir(parents=True)
    torn = tmp_path / "stages" / "dense-0"
    torn.mkdir()
    (torn / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN}\n{"step": 2, "tra')
    (torn / "freezing.json").write_text("{")
    stages = [{"name": "align", "dir": empty}, {"name": "dense", "dir": torn}, {"name": "gone", "dir": tmp_path / "no"}]
    _, text = read_page(write_report(tmp_path / "run", title="Nothing", stages=stages))
    for wanted in (
        "Stage align left no metrics.jsonl",
        "Nothing was recorded",
        "No freezing.json",
        "No results.json",
        "No predictions were kept",
        "nothing was handed on",
        "No provenance.json",
        "No resolved configuration",
    ):
        assert wanted in text, wanted


def test_a_frozen_tensor_that_moved_is_shown_in_words(tmp_path):
    rows = [{"part": "encoder", "parameters": 5, "trainable": False, "lr": None, "changed": 2, "unchanged": 1}]
    (tmp_path / "freezing.json").write_text(json.dumps({"stage": "x", "rows": rows}))
    _, text = read_page(write_report(tmp_path, title="t", stages=[{"name": "x", "dir": tmp_path}]))
    assert "2 frozen tensors moved" in text and "verified" not in text


def test_predictions_are_taken_from_every_type_in_turn():
    rows = [{"type": t, "correct": True, "key": f"{t}{i}"} for t in "ab" for i in range(5)]
    right, wrong = choose_predictions(rows, most=5)
    assert [r["key"] for r in right] == ["a0", "b0", "a1", "b1", "a2"] and wrong == []


def test_chart_arithmetic():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.12, 5, log=True) == [0.2, 0.5, 1, 2, 5]
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)
    assert thin([0, 1, 2, 3], [1, math.nan, 3, 5], most=2) == ([1.0, 3.0], [2.0, 5.0])
    assert "logarithmic" in line_chart([Line("a", [1, 2], [0.1, 5])], title="t")
    assert "Nothing was recorded" in line_chart([Line("a", [1], [math.nan])], title="t")
    assert (duration(9.44), duration(59.6), duration(75), duration(3700)) == (
        "9.4 s",
        "60 s",
        "1 min 15 s",
        "1 h 1 min",
    )
