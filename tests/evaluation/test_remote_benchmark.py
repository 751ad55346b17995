"""A benchmark whose shards lie behind HTTP: the folder's predictions, through faults; one line when they are gone."""

import pytest
from fault_server import FaultServer
from tiny_vlm import IMAGE_SIZE
from tiny_world import draw_png

from fastvlm.data import remote
from fastvlm.data.listing import write_listing
from fastvlm.data.shards import ShardWriter
from fastvlm.data.sidecar import build_index
from fastvlm.data.source import Source
from fastvlm.evaluation.benchmark import Benchmark
from fastvlm.evaluation.vqa_accuracy import VQAAccuracy


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 1)


@pytest.fixture
def shards(tmp_path, tiny_tokenizer):
    """Two shards of questions with their indexes, a train shard for the examples, and the listing."""
    folder = tmp_path / "questions"
    for split, count in (("val", 12), ("train", 3)):
        with ShardWriter(folder, split, max_samples=8) as writer:
            for i in range(count):
                content = [{"type": "image"}, {"type": "text", "text": f"what number stands {'here ' * (i % 4)}"}]
                messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "seven"}]
                meta = {"question_id": i, "image_id": i // 2, "answers": ["seven"] * 10}
                writer.write(f"{split}-{i}", {"messages": messages, "meta": meta}, [draw_png(i // 2, (24, 20))])
    for shard in folder.glob("*.tar"):
        build_index(shard, tiny_tokenizer)
    write_listing(folder)
    return folder


@pytest.fixture
def answer(tiny_model, tiny_tokenizer):
    def go(path, out=None) -> list[str]:
        options = {"protocol": VQAAccuracy(), "batch_size": 3, "window": 5, "max_new_tokens": 4, "resamples": 10}
        task = Benchmark("tiny", source=Source("tiny", path=path), shots=2, **options)
        result = task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, out=out)
        return [row["prediction"] for row in result["predictions"]]

    return go


def test_questions_from_a_web_server_have_the_answers_of_the_folder(shards, answer, tmp_path):
    expected = answer(shards)
    assert len(expected) == 12 and len(set(expected)) > 2
    with FaultServer(shards) as server:
        assert answer(server.url, tmp_path / "out") == expected
        assert {server.count(f"val-{i:05d}.tar") for i in range(2)} == {1}
        pages = list((tmp_path / "out/predictions/tiny").glob("*.jpg"))
        assert len(pages) == 12  # thumbnails come from there too
    with FaultServer(
        shards, fault=lambda method, name, count: "cut" if method == "GET" and count < 2 else ""
    ) as server:
        assert answer(server.url) == expected


def test_a_shard_that_cannot_be_had_is_named_and_what_is_answered_is_kept(shards, answer, tmp_path):
    expected = answer(shards)
    gone = lambda method, name, count: "404" if (method, name) == ("GET", "val-00001.tar") else ""
    with FaultServer(shards, fault=gone) as server, pytest.raises(ValueError, match=r"val-00001\.tar"):
        answer(server.url, tmp_path / "out")
    kept = list((tmp_path / "out").glob("predictions/.tiny-*/0*.json"))
    assert len(kept) == 1
    with FaultServer(shards) as server:
        assert answer(server.url, tmp_path / "again") == expected
