"""What img2dataset wrote is read where it lies."""

from __future__ import annotations

import json

import document_layouts
import pyarrow.parquet as pq
import pytest
from tiny_world import draw_png

from data.prepare import prepare
from fastvlm.data.index import load_index
from fastvlm.data.shards import ShardReader, parse_sample
from fastvlm.data.source import Source

SETTINGS = {"template": "roles", "workers": 1}


@pytest.fixture
def laion(tmp_path):
    return document_layouts.write_img2dataset(tmp_path / "laion")


def test_prepare_indexes_in_place_and_counts_what_failed(laion, tmp_path, tokenizer):
    before = {p.name: p.read_bytes() for p in laion.iterdir()}
    done = prepare("laion", out=tmp_path / "out", path=str(laion), tokenizer=tokenizer.path, **SETTINGS)
    assert done["counts"] == {"laion": {"train": 4}}
    counts = {reason: (row["count"], row["examples"]) for reason, row in done["dropped"]["train"].items()}
    assert counts == {
        "failed_to_download": (2, ["000000000", "000010000"]),
        "failed_to_resize": (1, ["000010001"]),
        "no caption": (1, ["000010003"]),
    }
    failed = json.loads((tmp_path / "out/failed.json").read_text())
    assert failed == {"HTTP Error 404: Not Found": 2, "image decoding error": 1}
    assert {p.name: p.read_bytes() for p in laion.iterdir() if p.name in before} == before
    assert {p.name for p in laion.iterdir()} - set(before) == {"00000.tar.idx.parquet", "00001.tar.idx.parquet"}
    assert prepare("laion", out=tmp_path / "out", path=str(laion), tokenizer=tokenizer.path, **SETTINGS)["skipped"]


def test_statistics_stand_in_for_a_missing_parquet_and_silence_is_noted(tmp_path, tokenizer):
    document_layouts.write_img2dataset(tmp_path / "a", table=False)
    done = prepare("laion", out=tmp_path / "out", path=str(tmp_path / "a"), tokenizer=tokenizer.path, **SETTINGS)
    assert done["dropped"]["train"]["failed_to_download"] == {"count": 2, "examples": []}
    assert done["dropped"]["train"]["failed_to_resize"]["count"] == 1 and not done["notes"]["train"]
    document_layouts.write_img2dataset(tmp_path / "b", table=False, statistics=False)
    done = prepare("laion", out=tmp_path / "out2", path=str(tmp_path / "b"), tokenizer=tokenizer.path, **SETTINGS)
    assert set(done["dropped"]["train"]) == {"no caption"} and sum(done["notes"]["train"].values()) == 2


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_every_encode_format_is_read_whatever_else_failed(kind, tmp_path, tokenizer):
    """The suffix follows img2dataset's `encode_format`. A row in the tar without its image is no lesson in text."""
    raw = document_layouts.write_img2dataset(tmp_path / "laion", kind=kind, failed=True)
    done = prepare("laion", out=tmp_path / "out", path=str(raw), tokenizer=tokenizer.path, **SETTINGS)
    assert done["counts"] == {"laion": {"train": 4}}
    counts = {reason: row["count"] for reason, row in done["dropped"]["train"].items()}
    assert counts == {"no caption": 1, "failed_to_download": 2, "failed_to_resize": 1}
    assert not done["notes"]["train"]
    index = Source("laion", path=raw, shards="*.tar").load("train", tokenizer)
    rows = [row for row, fault in enumerate(index.faults.to_pylist()) if not fault]
    samples = [index.read(row, ShardReader()) for row in rows]
    assert all(sample.record["document"][0] == {"type": "image"} for sample in samples)
    drawn = [document_layouts.encode_as(draw_png(10 * int(s.key[4]) + int(s.key[-1])), kind) for s in samples]
    assert [sample.images for sample in samples] == [[image] for image in drawn]
    for file in (*raw.glob("0000?.parquet"), *raw.glob("*_stats.json")):
        file.unlink()
    done = prepare("laion", out=tmp_path / "bare", path=str(raw), tokenizer=tokenizer.path, **SETTINGS)
    assert done["dropped"]["train"]["no image"] == {"count": 3, "examples": ["000000000", "000010000", "000010001"]}


def test_a_shard_still_being_written_is_refused(laion, tmp_path, tokenizer):
    shard = laion / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-9000])
    with pytest.raises(ValueError, match="is img2dataset still writing it"):
        prepare("laion", out=tmp_path / "out", path=str(laion), tokenizer=tokenizer.path, **SETTINGS)


def test_a_source_names_its_shards_by_range_or_pattern(laion, tokenizer):
    index = Source("laion", path=laion, shards="{00000..00001}.tar").load("train", tokenizer)
    assert index.num_samples == 5
    assert index.keys.to_pylist() == ["000000001", "000000002", "000000003", "000010002", "000010003"]
    assert Source("laion", path=laion, shards="*.tar").load("train", tokenizer).checksum == index.checksum
    assert Source("laion", path=laion, shards="00001.tar").load("train", tokenizer).num_samples == 2
    with pytest.raises(ValueError, match="00002.tar: no such shard, and shards={00000..00002}.tar names it"):
        Source("laion", path=laion, shards="{00000..00002}.tar").load("train", tokenizer)
    with pytest.raises(ValueError, match=r"no shards cc3m-\*.tar"):
        Source("laion", path=laion, shards="cc3m-*.tar").load("train", tokenizer)
    with pytest.raises(ValueError, match=r"no shards train-\*.tar"):
        Source("laion", path=laion).load("train", tokenizer)
    source = Source("laion", path=laion, shards="*.tar")
    assert source.has_split("train") and not source.has_split("val")  # never the training shards once more


def test_captions_come_from_the_json_where_there_is_no_txt_and_columns_become_meta(laion, tokenizer):
    index = load_index(laion, "train", tokenizer, names="*.tar")
    samples = [index.read(row, ShardReader()) for row in range(4)]
    words = [sample.record["document"][1]["text"] for sample in samples]
    assert words == ["picture 0 1", "picture 0 2", "picture 0 3", "picture 1 2"]
    assert samples[0].images == [draw_png(1)]
    meta = samples[0].record["meta"]
    assert meta["similarity"] == 0.26 and meta["NSFW"] == "UNLIKELY"
    assert (meta["width"], meta["original_width"]) == (8, 16) and meta["url"].startswith("https://")
    assert not {"caption", "exif", "status"} & set(meta)
    assert index.faults.to_pylist()[4].endswith("no caption in txt or json")


def test_sources_filter_by_img2datasets_columns(laion, tokenizer):
    def keys(**filters):
        source = Source("laion", path=laion, shards="*.tar", filters=filters)
        index = source.load("train", tokenizer)
        return [index.key(row)[-5:] for row in source.select(index)[0].tolist()]

    assert keys(similarity={"min": 0.265}) == ["00002", "00003", "10002"]
    assert len(keys(nsfw_level={"max": 0}, original_width={"min": 16})) == 4
    assert keys(original_width={"min": 17}, similarity={"min": 0.0}) == []


def test_an_empty_caption_is_a_fault_and_not_a_lesson():
    with pytest.raises(ValueError, match="no caption"):
        parse_sample("k", {"jpg": draw_png(1), "txt": b" \n", "json": b"{}"})


def test_a_refused_index_names_the_command_that_builds_it(laion, tokenizer):
    with pytest.raises(ValueError, match=r"python -m fastvlm.data.index .* --shards '\*.tar' --tokenizer"):
        load_index(laion, "train", tokenizer, names="*.tar", rebuild=False)


def test_a_parquet_that_disagrees_with_its_shard_is_noted(laion, tmp_path, tokenizer):
    table = pq.read_table(laion / "00000.parquet")
    pq.write_table(table.slice(0, 3), laion / "00000.parquet")
    done = prepare("laion", out=tmp_path / "out", path=str(laion), tokenizer=tokenizer.path, **SETTINGS)
    assert done["notes"]["train"] == {"the parquet has another number of successes than the shard has samples": 1}
