"""Every recipe of this kind through the real `data/prepare.py`, and what it wrote read by who needs it."""

from __future__ import annotations

from pathlib import Path

import document_layouts
import pytest
import vqa_layouts

from data.prepare import prepare
from fastvlm.data.plan import Plan
from fastvlm.data.source import Mixture, Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.questions import read_questions

QUESTIONS = {  # recipe -> kept by split, dropped by split
    "vqav2": ({"train": 3, "val": 5}, {"train": 4, "val": 4}),
    "okvqa": ({"train": 1, "val": 1}, {"train": 0, "val": 0}),
    "aokvqa": ({"train": 1, "val": 2}, {"train": 0, "val": 0}),
    "textvqa": ({"train": 1, "val": 1}, {"train": 0, "val": 0}),
    "chartqa": ({"train": 2, "val": 4, "test": 4}, {"train": 0, "val": 0, "test": 0}),
    "stvqa": ({"train": 39, "val": 1}, {"train": 0, "val": 0}),
    "docvqa": ({"train": 1, "val": 2}, {"train": 0, "val": 0}),
    "pope": ({"test": 6}, {"test": 0}),
    "vizwiz": ({"train": 2, "val": 2}, {"train": 0, "val": 0}),
}


def count_dropped(done: dict) -> dict[str, int]:
    return {split: sum(row["count"] for row in reasons.values()) for split, reasons in done["dropped"].items()}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_prepared_trained_on_and_evaluated(name, tmp_path, tokenizer):
    raw = getattr(vqa_layouts, f"write_{name}")(tmp_path / "raw")
    settings = {"tokenizer": tokenizer.path, "template": "roles", "workers": 1}
    done = prepare(name, out=tmp_path / "out", path=str(raw), **settings)
    kept, dropped = QUESTIONS[name]
    assert done["counts"] == {name: kept} and count_dropped(done) == dropped
    source = Source(name, path=tmp_path / "out", rebuild_index=False)
    transform = ImageTransform(image_size=16)
    for split in set(kept) - {"train"}:
        questions = read_questions(source.load(split, tokenizer), source=name, limit=None, transform=transform)
        assert len(questions) == kept[split] and all(len(q.images) == 1 and q.answer for q in questions)
    if "train" in kept:
        mixture = Mixture({name: source}, weights={name: 1}, unit="answer_tokens")
        plan = Plan(mixture, tokenizer, tokens_per_image=4, max_tokens=512, max_images=8, batch_size=1)
        assert plan.num_steps > 0


@pytest.mark.parametrize("built", [False, True])
def test_obelics_is_prepared(built, tmp_path, tokenizer):
    raw = document_layouts.write_obelics(tmp_path / "raw", built=built)
    options = {} if built else {"images": str(raw / "fetched")}
    settings = {"tokenizer": tokenizer.path, "template": "roles", "workers": 1}
    done = prepare("obelics", out=tmp_path / "out", path=str(raw / "data"), **options, **settings)
    assert done["counts"] == {"obelics": {"train": 2}} and count_dropped(done) == {"train": 2}
    assert done["notes"]["train"]["image missing: left out of its document"] == 1
    assert Source("obelics", path=tmp_path / "out").load("train", tokenizer).num_images.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("name", "write", "options", "kept", "dropped"),
    [
        ("mmc4", document_layouts.write_mmc4, {"images": "images"}, 3, 2),
        ("mmc4", document_layouts.write_mmc4_tar, {}, 2, 1),
        ("fineweb_edu", document_layouts.write_fineweb, {"max_chars": 30}, 3, 1),
        ("lmsys_chat", document_layouts.write_lmsys, {}, 2, 3),
    ],
)
def test_documents_and_chats_are_prepared(name, write, options, kept, dropped, tmp_path, tokenizer):
    raw: Path = write(tmp_path / "raw")
    options = {key: str(raw / value) if key == "images" else value for key, value in options.items()}
    settings = {"tokenizer": tokenizer.path, "template": "roles", "workers": 1}
    done = prepare(name, out=tmp_path / "out", path=str(raw), **options, **settings)
    assert done["counts"] == {name: {"train": kept}} and count_dropped(done) == {"train": dropped}
    index = Source(name, path=tmp_path / "out", rebuild_index=False).load("train", tokenizer)
    assert set(index.faults.to_pylist()) == {""} and (index.answer_tokens > 0).all()
