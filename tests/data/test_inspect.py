from __future__ import annotations

from pathlib import Path

from PIL import Image

from data.inspect import draw_samples, print_report, split_runs
from fastvlm.data.conversation import encode_record
from fastvlm.data.plan import Plan
from fastvlm.data.plan_report import report
from fastvlm.data.source import Mixture, Source


def test_runs_of_a_sample_say_what_is_learned(tokenizer):
    parts = [{"type": "image"}, {"type": "text", "text": "which digit"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "nine"}]}
    encoded = encode_record(record, tokenizer, tokens_per_image=3)
    assert split_runs(encoded.input_ids, encoded.labels, tokenizer) == [
        ("<|user|>", False, True),
        ("<image: 3 slots>", False, True),
        ("which digit", False, False),
        ("<|assistant|>", False, True),
        ("nine", True, False),
        ("<|end|>", True, True),
    ]


def test_a_mixture_is_shown_as_a_table_and_a_picture(sources, tokenizer, tmp_path: Path, capsys):
    there = {k: Source(k, path=v) for k, v in sources.items()}
    mixture = Mixture(there, weights=dict.fromkeys(sources, 1), unit="samples")
    plan = Plan(mixture, tokenizer, tokens_per_image=2, batch_size=4, max_tokens=20)
    print_report(report(plan))
    printed = capsys.readouterr().out
    assert all(name in printed for name in sources) and "25.0" in printed
    draw_samples(plan, tokenizer, image_size=16, count=8, out=tmp_path / "sheets" / "x.png")
    assert Image.open(tmp_path / "sheets" / "x.png").size[0] == 1500
