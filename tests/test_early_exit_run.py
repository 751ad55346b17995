"""A run whose encoder learns when to stop: cost in tokens and FLOPs in the metrics, fewer tokens in the answers."""

import re

import torch

from fastvlm.inference.opening import open_engine
from tests.conftest import TINY

SMALL = ["encoder.encoder.dims=[8,8,16]", "encoder.encoder.depths=[1,1,1]"]


def test_a_learned_exit_trains_reports_its_cost_and_answers_from_fewer_tokens(cli, tmp_path):
    tiny = [argument for argument in TINY if not argument.startswith("encoder.")]
    options = [
        "pipeline=dense",
        "encoder=early_exit_micro",
        "encoder.threshold=0.2",  # below what an untrained gate says: everything leaves at the first exit
        "resampler=identity",
        "stages.dense.steps=3",
        "log_every=1",
    ]
    options += ["stages.dense.batch_size=2", "stages.dense.image_size=64", "stages.dense.val_samples=4"]
    done = cli("train.py", *tiny, *SMALL, *options, "name=exits")
    assert "encoder EarlyExitEncoder" in done.stdout
    lines = (tmp_path / "runs" / "exits" / "stages" / "dense" / "metrics.jsonl").read_text()
    for metric, low, high in (("vision_tokens", 4, 64), ("vision_gflops", 1e-5, 0.1), ("exit", 0, 2)):
        values = [float(value) for value in re.findall(rf'"(?:train|val)/{metric}": ([\d.e-]+)', lines)]
        assert len(values) >= 3 and all(low <= value <= high for value in values), metric
    engine = open_engine(str(tmp_path / "runs" / "exits"))
    asked = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which digit"}]}]}
    (answer,) = engine.generate([asked], [[torch.zeros(3, 64, 64, dtype=torch.uint8)]])
    assert engine.tokens_per_image == 64 and answer.num_image_tokens == 4
