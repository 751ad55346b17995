"""`shards.json` beside the shards: a shard that it names is never missed in silence, and a new one is welcome."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
from tiny_world import write_source

from fastvlm.data import index
from fastvlm.data.index import load_index
from fastvlm.data.listing import write_listing
from fastvlm.data.shards import find_shards
from fastvlm.data.source import Source
from fastvlm.data.stores import pack


@pytest.fixture
def folder(tmp_path):
    """Three train shards and one of val, and their list."""
    write_source(tmp_path / "shards", "text", 30, max_samples=10)
    write_source(tmp_path / "shards", "text", 5, split="val", start=100)
    write_listing(tmp_path / "shards")
    return tmp_path / "shards"


def list_anew(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["index", str(folder), "--list"])
    index.main()


@pytest.mark.parametrize("names", [None, "*.tar", "train-*.tar"])
@pytest.mark.parametrize("lost", [["train-00001.tar"], ["train-00000.tar", "train-00002.tar"]], ids=["one", "two"])
def test_a_lost_shard_is_refused_in_one_line_whose_fix_works(folder, tokenizer, monkeypatch, lost, names):
    for name in lost:
        (folder / name).unlink()
    source = Source("x", path=folder, shards=names)
    more = " and 1 more" if len(lost) > 1 else ""
    with pytest.raises(
        ValueError, match=rf"{folder}/shards.json names {lost[0]}{more}, and there is no such"
    ) as raised:
        source.load("train", tokenizer)
    assert "\n" not in str(raised.value)
    assert source.has_split("val"), "the other split is whole"
    command = re.search(r"`python -m fastvlm.data.index (\S+) --list`", str(raised.value))
    list_anew(command[1], monkeypatch)
    assert source.load("train", tokenizer).num_samples == 10 * (3 - len(lost))


def test_every_way_to_the_shards_of_a_folder_notices(folder, tmp_path):
    (folder / "train-00002.tar").unlink()
    for look in (
        lambda: Source("x", path=folder).has_split("train"),
        lambda: find_shards(folder, "train"),
        lambda: pack(folder, "train", out=tmp_path / "store", format="lmdb"),
    ):
        with pytest.raises(ValueError, match="names train-00002.tar, and there is no such shard"):
            look()


def test_a_renamed_shard_is_named_under_both_names(folder, tokenizer):
    (folder / "train-00001.tar").rename(folder / "train-00007.tar")
    with pytest.raises(
        ValueError, match=r"names train-00001.tar, .* \(train-00007.tar is there and not named: renamed"
    ):
        load_index(folder, "train", tokenizer)


def test_a_shard_that_the_list_does_not_name_is_read(folder, tmp_path, tokenizer):
    write_source(tmp_path / "more", "text", 10, start=500)
    shutil.move(tmp_path / "more/train-00000.tar", folder / "train-00003.tar")
    assert load_index(folder, "train", tokenizer).num_samples == 40


def test_shards_written_anew_are_listed_anew_and_what_is_known_of_the_others_stays(folder, tokenizer):
    listing = json.loads((folder / "shards.json").read_text())
    listing["val"][0]["sha256"] = "of the recipe"
    (folder / "shards.json").write_text(json.dumps(listing))
    write_source(folder, "text", 10)
    assert load_index(folder, "train", tokenizer).num_samples == 10
    now = json.loads((folder / "shards.json").read_text())
    assert now["val"] == listing["val"] and [entry["name"] for entry in now["train"]] == ["train-00000.tar"]


def test_a_shard_whose_name_says_no_split_is_listed_as_train(folder):
    for old, new in (("train-00000", "00000"), ("train-00001", "cc3m-train-0000"), ("val-00000", "testA-00000")):
        (folder / f"{old}.tar").rename(folder / f"{new}.tar")
    listing = json.loads(write_listing(folder).read_text())
    names = {split: [entry["name"] for entry in entries] for split, entries in listing.items()}
    assert names == {"train": ["00000.tar", "cc3m-train-0000.tar", "train-00002.tar"], "testA": ["testA-00000.tar"]}


def test_a_list_that_is_none_is_refused_with_the_fix_and_one_of_somebody_else_is_no_matter(
    folder, tokenizer, monkeypatch
):
    (folder / "shards.json").write_text('{"train": [{"name": "train-00')
    with pytest.raises(ValueError, match=rf"{folder}/shards.json is not .*fastvlm.data.index .* --list`"):
        load_index(folder, "train", tokenizer)
    list_anew(folder, monkeypatch)
    assert load_index(folder, "train", tokenizer).num_samples == 30
    (folder / "shards.json").write_text('{"shardlist": [{"url": "train-00009.tar"}]}')
    assert load_index(folder, "train", tokenizer).num_samples == 30


def test_a_bucket_that_lost_a_shard_of_its_list_is_refused(folder, tokenizer):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.rm("/listed", recursive=True) if fs.exists("/listed") else None
    for file in folder.iterdir():
        fs.pipe_file(f"/listed/{file.name}", file.read_bytes())
    assert load_index("memory://listed", "train", tokenizer).num_samples == 30
    fs.rm_file("/listed/train-00001.tar")
    with pytest.raises(ValueError, match=r"memory://listed/shards.json names train-00001.tar, .* out of shards.json$"):
        load_index("memory://listed", "train", tokenizer)
    fs.rm_file("/listed/shards.json")
    assert load_index("memory://listed", "train", tokenizer).num_samples == 20
