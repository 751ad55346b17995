"""What breaks is skipped or refused, counted and named; nothing else moves."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import shutil
import tarfile
import threading
import time
import warnings
import zlib

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from tiny_world import make_record, write_source

from fastvlm.data.datamodule import MixtureDataModule
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.index import load_index
from fastvlm.data.plan import Plan
from fastvlm.data.plan_report import notes, report
from fastvlm.data.shards import ShardReader, ShardWriter, scan_shard
from fastvlm.data.sidecar import build_index, sidecar
from fastvlm.data.source import Mixture, Source
from fastvlm.data.transforms import decode_image
from tests.conftest import TINY


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
    assert any("write the shard again" in line for line in notes(plan))
    assert report(plan)["sources"]["x"]["broken_shards"]


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
    with (
        pytest.warns(UserWarning, match="not a tar"),
        pytest.raises(ValueError, match="no sample is left of 0 .*write them"),
    ):
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
    plan = plan_of(write_with_broken_images(tmp_path, 16, range(7)), tokenizer)
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8, max_skipped_share=0.01)
    with pytest.raises(
        ValueError, match=r"7 of \d+ samples could not be read, .*max_skipped_share=0.01: x/k[0-6], x/k[0-6]"
    ):
        for i in range(8):
            dataset[i]


@pytest.mark.parametrize(
    ("share", "stops"), [(0.0, True), (0.001, False), (0.005, False), (0.01, False), (0.03, True), (0.2, True)]
)
def test_a_run_stops_at_a_larger_share_of_broken_samples_and_not_by_chance_at_a_smaller_one(
    sources, tokenizer, share, stops
):
    """64 workers of which each reads 10,000 samples, a random `share` of them broken; at 0, one is broken after all."""
    dataset = PlannedDataset(plan_of(sources["text"], tokenizer), tokenizer=tokenizer, image_size=8)
    dataset.max_skipped_share = 0.01 if share else 0.0
    num_stopped = 0
    for worker in range(64):
        broken = np.flatnonzero(np.random.default_rng(worker).random(10_000) < (share or 1e-3))
        dataset._skipped = []
        try:
            for number in broken.tolist():
                dataset._num_read = number + 1
                dataset._skip(0, 0, ValueError("broken"))
        except ValueError:
            num_stopped += 1
    assert num_stopped == (64 if stops else 0)


def test_what_no_index_can_read_is_left_out_of_the_plan_by_name(tmp_path, tokenizer):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("good", {"document": "a small seven"})
        writer.write("image", {"document": [{"type": "image"}]}, [b"no image"])
        writer.write("role", {"messages": [{"role": "robot", "content": "x"}]})
        writer.write("mute", {"messages": [{"role": "user", "content": "which digit"}]})
    plan = plan_of(tmp_path, tokenizer)
    left_out = {why: e["keys"] for source in report(plan)["sources"].values() for why, e in source["excluded"].items()}
    assert left_out == {"unreadable": ["image", "role"], "no learned token": ["mute"]}
    assert report(plan)["sources"]["x"]["samples"] == 1


def setup_data(folder, tokenizer, *, share=0.01, **of_source):
    mixture = Mixture({"x": Source("x", path=folder, **of_source)}, weights={"x": 1}, unit="samples")
    options = {"image_size": 8, "tokens_per_image": 2, "batch_size": 2, "max_tokens": 80, "num_steps": 8}
    data = MixtureDataModule(mixture, tokenizer=tokenizer, max_skipped_share=share, **options)
    data.setup()
    return data.plan.sources[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_cut_short_is_refused_unless_such_shards_are_a_small_share(tmp_path, tokenizer, split):
    write_source(tmp_path, "text", 40, max_samples=10)
    write_source(tmp_path, "text", 40, max_samples=10, start=100, split="val")
    shard = tmp_path / f"{split}-00002.tar"
    whole, _ = scan_shard(shard)
    shard.write_bytes(shard.read_bytes()[: whole[6].offset + whole[6].size - 10])
    with pytest.warns(UserWarning, match="whole samples before the break"):
        with pytest.raises(ValueError, match=rf"source x: 1 of 4 shards of {split} end at a break, .*=0.2 ") as error:
            setup_data(tmp_path, tokenizer, share=0.2)
        assert f"{shard}: " in str(error.value) and "5 whole samples before it); copy or" in str(error.value)
        assert len(setup_data(tmp_path, tokenizer, share=0.25).rows) == (35 if split == "train" else 40)


def test_samples_that_no_index_can_read_are_refused_above_the_share_of_those_skipped_while_reading(tmp_path, tokenizer):
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(60):
            record, images = make_record("caption", i)
            writer.write(f"k{i}", record, [b"no image"] if i in (3, 5) else images)
    with pytest.raises(ValueError, match=r"source x: 2 of 60 samples of train cannot be read, .*=0.01 .*0.tar: k3"):
        setup_data(tmp_path, tokenizer)
    assert len(setup_data(tmp_path, tokenizer, share=0.02).rows) == 58


def test_images_that_img2dataset_could_not_fetch_are_no_damage(tmp_path, tokenizer):
    failed = json.dumps({"caption": "a seven", "status": "failed_to_download"}).encode()
    sound = [(f"s{i}.txt", b"a seven") for i in range(5)]
    write_members(tmp_path / "00000.tar", sound + [(f"f{i}.json", failed) for i in range(20)])
    assert len(setup_data(tmp_path, tokenizer, shards="*.tar").rows) == 5


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


def test_a_shard_put_back_is_read_anew_though_it_has_the_size_and_the_time_of_the_broken_one(tmp_path, tokenizer):
    shard = write_source(tmp_path, "text", 20) / "train-00000.tar"
    whole, stat = shard.read_bytes(), shard.stat()
    shard.write_bytes(whole[:10240] + b"x" * 512 + whole[10752:])
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.warns(UserWarning, match="bad header at byte 10240"):
        assert load_index(tmp_path, "train", tokenizer).num_samples < 20
    with pytest.warns(UserWarning, match="bad header at byte 10240"):  # nothing is built anew for it
        load_index(tmp_path, "train", tokenizer, rebuild=False)
    shard.write_bytes(whole)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_index(tmp_path, "train", tokenizer).num_samples == 20


def damage(index, column):
    """Change a bit of the last page of a column."""
    group = pq.read_metadata(index).row_group(0)
    one = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    data = bytearray(index.read_bytes())
    data[(one.dictionary_page_offset or one.data_page_offset) + one.total_compressed_size - 3] ^= 1
    index.write_bytes(data)


@pytest.mark.parametrize("column", ["num_images", "answer_tokens", "key"])
def test_an_index_with_damaged_columns_is_built_anew_or_refused(tmp_path, tokenizer, column):
    shard = write_source(tmp_path, "text", 20) / "train-00000.tar"
    sound = load_index(tmp_path, "train", tokenizer)
    damage(sidecar(shard), column)
    with pytest.raises(ValueError, match=r"train-00000.tar.idx.parquet is damaged; rebuild it with `python -m"):
        load_index(tmp_path, "train", tokenizer, rebuild=False)
    mended = load_index(tmp_path, "train", tokenizer)
    assert mended.checksum == sound.checksum and mended.answer_tokens.tolist() == sound.answer_tokens.tolist()


def test_a_column_damaged_under_a_run_is_named_with_the_remedy(tmp_path, tokenizer):
    shard = write_source(tmp_path, "text", 20) / "train-00000.tar"
    index = load_index(tmp_path, "train", tokenizer)
    damage(sidecar(shard), "crc32")
    for read in (lambda: index.crc32, lambda: index.read(0, ShardReader())):
        with pytest.raises(ValueError, match=r"train-00000.tar.idx.parquet cannot be read \(.*\); delete it"):
            read()


def test_a_shard_that_may_not_be_read_is_one_line_and_no_empty_index(tmp_path, tokenizer):
    write_source(tmp_path, "text", 5)
    (tmp_path / "train-00001.tar").mkdir()  # as a shard unpacked in its place
    with pytest.raises(ValueError, match=r"directory: .*train-00001.tar.*; its shards must be readable"):
        load_index(tmp_path, "train", tokenizer)


def test_numbers_in_a_header_that_are_none_end_the_shard_there(tmp_path):
    header = lambda map: {"GNU.sparse.map": map, "GNU.sparse.size": "10"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"k{i}.json")
            info.size, info.pax_headers = 2, header("0,x") if i == 2 else {}
            tar.addfile(info, io.BytesIO(b"{}"))
    spans, broken = scan_shard(tmp_path / "a.tar")
    assert [span.key for span in spans] == ["k0"] and "at byte" in broken


def test_an_empty_source_names_its_folder_and_the_fix(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no shards train-\*.tar; write them with"):
        load_index(tmp_path, "train", tokenizer)


def test_a_key_that_stands_twice_is_refused(tmp_path, tokenizer):
    write_source(tmp_path, "text", 2)
    (tmp_path / "train-00001.tar").write_bytes((tmp_path / "train-00000.tar").read_bytes())
    with pytest.raises(ValueError, match="key 'text-0000.' stands twice"):
        load_index(tmp_path, "train", tokenizer)


def left_out(source):
    return {why: [source.index.key(row) for row in rows.tolist()] for why, rows in source.excluded.items()}


def bomb_png(side: int) -> bytes:
    """A black PNG of `side` x `side` pixels, by hand: its rows are zeros and pack to a thousandth."""
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # one bit a pixel
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_picture_that_unpacks_to_gigabytes_is_left_out_by_name_without_being_unpacked(tmp_path, tokenizer):
    bomb = bomb_png(50_000)
    assert len(bomb) < 1 << 20
    write_source(tmp_path, "caption", 8)
    (tmp_path / "train-00000.tar").rename(tmp_path / "val-00000.tar")
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(8):
            record, images = make_record("caption", i)
            writer.write(f"k{i}", record, [bomb] if i == 2 else images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_of(tmp_path, tokenizer, num_steps=4)
    assert left_out(plan.sources[0]) == {"unreadable": ["k2"]}
    assert "50000" in plan.sources[0].index.faults[2].as_py() or "bomb" in plan.sources[0].index.faults[2].as_py()
    with pytest.raises(ValueError, match="50000 x 50000|decompression bomb"):
        decode_image(bomb, 64)
    # A GiB in units of KiB; the picture has 2.5 thousand million pixels.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def write_members(path, members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_member_name_that_climbs_out_of_its_folder_is_a_name_and_no_more(tmp_path, tokenizer):
    """Nothing is ever unpacked: a key is a name in logs."""
    record = lambda text: json.dumps({"document": text}).encode()
    folder = tmp_path / "deep/shards"
    folder.mkdir(parents=True)
    members = [(f"k{i}.json", record("a small seven")) for i in range(6)]
    members += [("../../evil.json", record("nine and three")), ("/etc/evil.json", record("a digit"))]
    write_members(folder / "train-00000.tar", members)
    plan = plan_of(folder, tokenizer, num_steps=4)
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
    keys = {key for i in range(4) for key in dataset[i].keys}
    assert keys == {*(f"k{i}" for i in range(6)), "../../evil", "/etc/evil"}
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"train-00000.tar", "train-00000.tar.idx.parquet"}


def test_json_of_the_wrong_types_is_left_out_sample_by_sample(tmp_path, tokenizer):
    wrong = {
        "list": b"[1, 2]",
        "text": b'"hello"',
        "nothing": b"{}",
        "number": b'{"document": 5}',
        "messages": b'{"messages": "hello"}',
        "entries": b'{"messages": [1, 2]}',
        "content": b'{"messages": [{"role": "user", "content": 7}]}',
        "parts": b'{"document": ["a", null]}',
        "kind": b'{"document": [{"type": "sound"}]}',
        "words": b'{"document": [{"type": "text", "text": 3}]}',
        "norole": b'{"messages": [{"content": "x"}]}',
        "nocontent": b'{"messages": [{"role": "user"}]}',
        "both": b'{"messages": [], "document": []}',
        "meta": b'{"document": "seven", "meta": [1]}',
        "types": b'{"document": "seven", "meta": {"types": [1, 2]}}',
        "huge": b'{"document": "seven", "meta": {"score": 1%s}}' % (b"0" * 400),
        "null": b'{"document": null}',
        "broken": b'{"document": "x',
        "latin": '{"document": "\xe9"}'.encode("latin-1"),
        "deep": b"[" * 100_000,
    }
    write_members(
        tmp_path / "train-00000.tar",
        [("good.json", b'{"document": "a small seven"}'), *((f"{k}.json", v) for k, v in wrong.items())],
    )
    plan = plan_of(tmp_path, tokenizer)
    assert report(plan)["sources"]["x"]["samples"] == 1
    assert left_out(plan.sources[0]) == {"unreadable": list(wrong)}
    faults = plan.sources[0].index.faults.to_pylist()
    assert all(fault.startswith(f"{key}: ") for key, fault in zip(wrong, faults[1:]))


def test_a_name_that_is_not_unicode_is_spelled_out_and_costs_no_sample(tmp_path, tokenizer):
    document = b'{"document": "a small seven", "meta": {"type": "a\\ud800", "b\\ud800": 3}}'
    names = ["good", "b\udcff", "b\udcfe"]  # bytes 255 and 254, as tarfile has them
    write_members(tmp_path / "train-00000.tar", [(f"{name}.json", document) for name in names])
    plan = plan_of(tmp_path, tokenizer)
    index = plan.sources[0].index
    assert index.keys.to_pylist() == ["good", "b\\udcff", "b\\udcfe"] and plan.sources[0].rows.tolist() == [0, 1, 2]
    assert set(index.types.to_pylist()) == {"a\\ud800"} and index.number("b\\ud800").tolist() == [3, 3, 3]
    batch = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)[0]
    assert len(batch.keys) == 2 and not batch.skipped


def test_empty_answers_and_questions_longer_than_the_context_are_left_out_by_reason(tmp_path, tokenizer):
    talk = lambda question, answer: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    }
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("good", talk("which digit", "seven"))
        writer.write("empty", talk("which digit", ""))
        writer.write("long", talk("which digit " * 100, "seven"))
        writer.write("cut", talk("which digit", "seven " * 100))
        writer.write("silent", {"messages": [{"role": "user", "content": "which digit"}]})
    plan = plan_of(tmp_path, tokenizer, num_steps=2)
    source = plan.sources[0]
    # An empty answer still teaches where an answer ends.
    assert [source.index.key(row) for row in source.rows.tolist()] == ["good", "empty", "cut"]
    assert left_out(source) == {"answer truncated away": ["long"], "no learned token": ["silent"]}
    assert source.num_truncated == 2
    assert any("1 samples left out, answer truncated away (long)" in line for line in notes(plan))


def test_a_loader_process_that_is_killed_ends_the_run_in_one_line_and_the_same_command_goes_on(cli, tmp_path):
    arguments = [*TINY, "pipeline=dense", "stages.dense.steps=40", "checkpoint_every=2", "name=killed"]
    arguments += ["hardware.num_workers=1"]
    killed = []

    def kill():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            time.sleep(0.02)
            if not list((tmp_path / "runs").glob("stages/*/step=*.ckpt")):
                continue
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    # pytest -> the process that commands fork from -> the run -> its loader
                    command, run = process.cmdline(), process.parent()
                    if run.parent().parent().pid == os.getpid() and any("warm.py" in word for word in command):
                        process.kill()
                        killed.append(process.pid)
                        break

    thread = threading.Thread(target=kill)
    thread.start()
    done = cli("train.py", *arguments, check=False)
    thread.join()
    assert killed, f"the stage ended before its loader could be killed\n{done.stdout}"
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "a loader process was killed" in line and "train.py" in line
    assert "Traceback" not in done.stderr
    again = cli("train.py", *arguments)
    assert "going on from step=" in again.stdout


def test_what_a_run_skips_is_counted_and_named_in_mlflow_and_the_report(cli, embedded, tmp_path):
    folder = tmp_path / "captions"
    shutil.copytree(embedded / "embedded/captions", folder)
    shard = folder / "train-00000.tar"
    spans, _ = scan_shard(shard)
    data, broken, mute = bytearray(shard.read_bytes()), spans[1], spans[2]
    name, offset, size = next(m for m in broken.members if m[0] == "0.png")
    data[offset + size // 2 : offset + size] = bytes(size - size // 2)  # the header of the picture is whole
    name, offset, size = next(m for m in mute.members if m[0] == "json")
    data[offset : offset + size] = b"x" * size
    shard.write_bytes(data)
    arguments = [a for a in TINY if a != "logger=none"]
    arguments += [
        "logger=mlflow",
        "pipeline=align",
        "stages.align.steps=40",
        "name=faulty",
        "data.max_skipped_share=0.1",
    ]
    arguments += [
        f"stages.align.mixture.sources.captions.path={folder}",
        "mixture@stages.align.mixture=embedded_captions",
    ]
    done = cli("train.py", *arguments)
    assert f"captions: 1 samples left out, unreadable ({mute.key})" in done.stdout
    assert f"skipped captions/{broken.key}: broken image" in done.stderr + done.stdout
    page = (tmp_path / "runs/faulty/report.html").read_text()
    assert mute.key in page and broken.key in page and "could not be read" in page and "left out: unreadable" in page
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = [r for r in client.search_runs(experiments) if r.info.run_name == "align"]
    assert run.data.metrics["train/skipped"] >= 1
    assert run.data.metrics["data/left_out/captions"] == 1
    assert {"left_out.json", "skipped.json"} <= {f.path for f in client.list_artifacts(run.info.run_id)}


def test_a_sound_source_warns_of_nothing(sources, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_index(sources["chat"], "train", tokenizer)
