"""What breaks is skipped or refused, counted and named; nothing else moves."""

from __future__ import annotations

import logging
import warnings

import pytest
from tiny_world import make_record, write_source

from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.index import build_index, load_index, sidecar
from fastvlm.data.plan import Plan
from fastvlm.data.shards import ShardWriter, scan_shard
from fastvlm.data.source import Mixture, Source


def plan_of(folder, tokenizer, **options):
    mixture = Mixture({"x": Source("x", path=folder)}, weights={"x": 1}, unit="samples")
    options = {"tokens_per_image": 2, "batch_size": 2, "max_tokens": 80, "num_steps": 8, "packing": False} | options
    return Plan(mixture, tokenizer, **options)


def test_a_truncated_tar_is_used_up_to_the_break_and_the_break_is_named(tmp_path, tokenizer):
    shard = write_source(tmp_path, "chat", 10) / "train-00000.tar"
    whole, _ = scan_shard(shard)
    shard.write_bytes(shard.read_bytes()[: whole[6].offset + whole[6].size - 10])
    with pytest.warns(UserWarning, match=r"train-00000.tar: .*byte.*; 6 whole samples before the break"):
        index = load_index(tmp_path, "train", tokenizer)
    assert index.num_samples == 6
    with pytest.warns(UserWarning, match="whole samples before the break"):  # also from a finished index
        plan = plan_of(tmp_path, tokenizer)
    assert any("write the shard again" in line for line in plan.notes())
    assert plan.report()["sources"]["x"]["broken_shards"]


def test_a_tar_cut_between_two_samples_is_noticed(tmp_path, tokenizer):
    shard = write_source(tmp_path, "text", 5) / "train-00000.tar"
    whole, broken = scan_shard(shard)
    assert not broken and len(whole) == 5
    shard.write_bytes(shard.read_bytes()[: whole[3].offset])
    spans, broken = scan_shard(shard)
    assert "end-of-archive" in broken and [s.key for s in spans] == [s.key for s in whole[:2]]


def test_a_broken_header_ends_the_shard_there(tmp_path, tokenizer):
    shard = write_source(tmp_path, "chat", 10) / "train-00000.tar"
    whole, _ = scan_shard(shard)
    data = bytearray(shard.read_bytes())
    data[whole[4].offset : whole[4].offset + 512] = b"\x07" * 512
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"bad header at byte {whole[4].offset} of .*; 3 whole samples"):
        assert load_index(tmp_path, "train", tokenizer).num_samples == 3  # the sample before may have lost members


def test_a_file_that_is_no_tar_has_no_samples(tmp_path, tokenizer):
    (tmp_path / "train-00000.tar").write_bytes(b"x" * 2000)
    with pytest.warns(UserWarning, match="not a tar"), pytest.raises(ValueError, match="no sample is left of 0"):
        plan_of(tmp_path, tokenizer)


def write_with_broken_images(folder, count, broken):
    with ShardWriter(folder, "train") as writer:
        for i in range(count):
            record, images = make_record("caption", i)
            if i in broken:  # a PNG whose header is fine and whose pixels are not
                images = [images[0][:60] + bytes(len(images[0]) - 60)]
            writer.write(f"k{i}", record, images)
    return folder


def test_a_broken_image_is_skipped_and_nothing_else_moves(tmp_path, tokenizer, caplog):
    sound = plan_of(write_with_broken_images(tmp_path / "a", 16, ()), tokenizer)
    plan = plan_of(write_with_broken_images(tmp_path / "b", 16, (3,)), tokenizer)
    read = lambda p: [PlannedDataset(p, tokenizer=tokenizer, image_size=8)[i] for i in range(8)]
    with caplog.at_level(logging.WARNING):
        batches = read(plan)
    assert [key for b in batches for key in b.skipped] == ["x/k3"]
    assert "skipped x/k3: broken image" in caplog.text
    for ours, theirs in zip(batches, read(sound)):
        assert [k for k in theirs.keys if k != "k3"] == list(ours.keys)
        assert ours.input_ids.shape[0] == 2 and ours.num_answer_tokens == theirs.num_answer_tokens


def test_too_many_broken_samples_stop_the_run_by_name(tmp_path, tokenizer):
    plan = plan_of(write_with_broken_images(tmp_path, 16, (3, 5)), tokenizer)
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8, max_skipped_share=0.01)
    with pytest.raises(
        ValueError, match=r"2 of \d+ samples could not be read, .*max_skipped_share=0.01: x/k[35], x/k[35]"
    ):
        for i in range(8):
            dataset[i]


def test_what_no_index_can_read_is_left_out_of_the_plan_by_name(tmp_path, tokenizer):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("good", {"document": "a small seven"})
        writer.write("image", {"document": [{"type": "image"}]}, [b"no image"])
        writer.write("role", {"messages": [{"role": "robot", "content": "x"}]})
        writer.write("mute", {"messages": [{"role": "user", "content": "which digit"}]})
    plan = plan_of(tmp_path, tokenizer)
    left_out = {why: e["keys"] for source in plan.report()["sources"].values() for why, e in source["excluded"].items()}
    assert left_out == {"unreadable": ["image", "role"], "no learned token": ["mute"]}
    assert plan.report()["sources"]["x"]["samples"] == 1


def test_a_shard_that_changes_under_the_run_is_noticed_by_its_checksum(tmp_path, tokenizer):
    shard = write_source(tmp_path, "caption", 20) / "train-00000.tar"
    plan = plan_of(tmp_path, tokenizer)
    data = bytearray(shard.read_bytes())
    spans, _ = scan_shard(shard)
    name, offset, size = spans[4].members[0]
    data[offset + 30] ^= 1
    shard.write_bytes(data)
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
    for row in range(20):
        if row == 4:
            with pytest.raises(ValueError, match="changed after it was indexed"):
                dataset.read(0, row)
        else:
            dataset.read(0, row)


def test_a_shard_that_vanishes_under_the_run_is_named(tmp_path, tokenizer):
    write_source(tmp_path, "text", 30, max_samples=10)
    plan = plan_of(tmp_path, tokenizer, num_steps=30)
    (tmp_path / "train-00001.tar").unlink()
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
    with pytest.raises(ValueError, match="train-00001.tar"):
        for i in range(30):
            dataset[i]


def test_a_stale_index_is_rebuilt_or_refused_with_the_command(tmp_path, tokenizer, other_tokenizer):
    shard = write_source(tmp_path, "text", 5) / "train-00000.tar"
    command = r"python -m fastvlm.data.index .* --split train --tokenizer .* --template roles"
    with pytest.raises(ValueError, match=f"missing; rebuild it with `{command}"):
        load_index(tmp_path, "train", tokenizer, rebuild=False)
    build_index(shard, tokenizer)
    with pytest.raises(ValueError, match=f"made with tokenizer {tokenizer.fingerprint}.*{command}"):
        load_index(tmp_path, "train", other_tokenizer, rebuild=False)
    old = sidecar(shard).read_bytes()
    # One sample more fits into the padding of a tar (same size); thirty more do not.
    for count, reason in ((6, "of other content"), (35, "of a shard of")):
        write_source(tmp_path, "text", count, max_samples=100)
        sidecar(shard).write_bytes(old)
        with pytest.raises(ValueError, match=reason):
            load_index(tmp_path, "train", tokenizer, rebuild=False)
        assert load_index(tmp_path, "train", tokenizer).num_samples == count
    sidecar(shard).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="unreadable"):
        load_index(tmp_path, "train", tokenizer, rebuild=False)
    data = bytearray(shard.read_bytes())
    build_index(shard, tokenizer)
    data[600] ^= 1  # same size, other content
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="other content"):
        load_index(tmp_path, "train", tokenizer, rebuild=False)


def test_an_empty_source_names_its_folder_and_the_fix(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no shards train-\*.tar; write them with"):
        load_index(tmp_path, "train", tokenizer)


def test_a_key_that_stands_twice_is_refused(tmp_path, tokenizer):
    write_source(tmp_path, "text", 2)
    (tmp_path / "train-00001.tar").write_bytes((tmp_path / "train-00000.tar").read_bytes())
    with pytest.raises(ValueError, match="key 'text-0000.' stands twice"):
        load_index(tmp_path, "train", tokenizer)


def test_a_sound_source_warns_of_nothing(sources, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_index(sources["chat"], "train", tokenizer)
