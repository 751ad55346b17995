import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE

from fastvlm.bench import __main__ as bench
from fastvlm.inference.clock import Clock, count_flops, percentiles


def test_a_run_is_measured_in_all_its_parts(monkeypatch, tiny_model, tiny_tokenizer, tmp_path, capsys):
    config = OmegaConf.create({"image_size": IMAGE_SIZE})
    monkeypatch.setattr("fastvlm.build.load_run", lambda run: (tiny_model, tiny_tokenizer, config))
    (tmp_path / "config.yaml").touch()
    out = tmp_path / "speed.json"
    bench.main([f"run={tmp_path}", "requests=3", "tokens=6", "batch=2", f"out={out}"])
    speed = json.loads(out.read_text())
    assert set(speed["parts"]) == {"preprocessing", "encoding", "projection", "prefill", "first decode"}
    assert min(speed["parts"].values()) > 0
    assert 0 < speed["ttft"]["p50"] <= speed["ttft"]["p99"] <= speed["ttft"]["max"] < speed["latency"]["max"]
    # A request reads, encodes and prefills; the parts are measured in the same requests or beside them.
    assert speed["ttft"]["p50"] > speed["parts"]["prefill"]
    assert speed["image_tokens"] == TOKENS_PER_IMAGE and speed["answer_tokens"] == 6
    for key in ("tokens_per_second", "batch_tokens_per_second", "reference_tokens_per_second", "second_question"):
        assert math.isfinite(speed[key]) and speed[key] > 0
    printed = capsys.readouterr().out
    assert "transformers' generate" in printed and "second question" in printed and "levers: none" in printed


def test_mistakes_are_one_line(tmp_path):
    for argument, named in (
        ("runn=x", "keys are run="),
        ("requests=0", "1 or more"),
        ("tokens=many", "whole number"),
        ("reference=yes", "reference=yes must be true or false"),
        ("reference=1", "reference=1 must be true or false"),
        (f"out={tmp_path}", "is a folder; name a file, such as"),
        (f"out={tmp_path}/none/speed.json", "there is no folder .*none; make it first"),
    ):
        with pytest.raises(ValueError, match=named):
            bench.parse(["run=x", argument])
    assert bench.parse(["run=x", "reference=True"])["reference"] == "true"
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="device foo"):
        bench.main([f"run={tmp_path}", "device=foo"])
    with pytest.raises(ValueError, match="run=DIR"):
        bench.parse([])
    with pytest.raises(ValueError, match="time=sun"):
        Clock(kind="sun")


def test_percentiles_are_nearest_ranks():
    values = percentiles([float(i) for i in range(100, 0, -1)])
    assert values == {"p50": 50.5, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert set(percentiles([2.0]).values()) == {2.0}


def test_operations_of_a_product_are_two_a_multiplication():
    linear = torch.nn.Linear(30, 40, bias=False)
    assert count_flops(lambda: linear(torch.ones(5, 30))) == 2 * 5 * 30 * 40
