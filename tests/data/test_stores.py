"""A source in an LMDB or HDF5 file gives what its shards give: samples, plan, batches; and its faults are told."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_world import draw_png

from fastvlm.data import stores as module
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.index import load_index
from fastvlm.data.plan import Plan
from fastvlm.data.plan_report import largest_error
from fastvlm.data.shards import ShardReader
from fastvlm.data.source import Mixture, Source
from fastvlm.data.stores import open_store, pack

FORMATS = ["lmdb", "hdf5"]
BUDGET = {"tokens_per_image": 4, "batch_size": 4, "max_tokens": 64, "max_images": 4}


@pytest.fixture(scope="module", params=FORMATS)
def stores(request, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    for kind, folder in sources.items():
        for split in ("train", "val"):
            pack(folder, split, out=out / kind, format=request.param)
    return {kind: out / kind for kind in sources}


def test_every_sample_of_a_store_is_that_of_its_shards(sources, stores, tokenizer):
    for kind in sources:
        for split in ("train", "val"):
            shards, store = (load_index(folder[kind], split, tokenizer) for folder in (sources, stores))
            assert store.keys.to_pylist() == shards.keys.to_pylist() and len(store.shards) == 1
            for column in ("num_images", "text_tokens", "answer_tokens"):
                assert getattr(store, column).tolist() == getattr(shards, column).tolist()
            one, two = ShardReader(), ShardReader()
            for row in range(shards.num_samples):
                assert shards.read(row, one) == store.read(row, two)


def mixture_of(folders):
    sources = {kind: Source(kind, path=folder) for kind, folder in folders.items()}
    return Mixture(sources, weights={"caption": 3, "pages": 2, "chat": 4, "text": 1}, unit="answer_tokens")


def test_stores_plan_with_exact_shares_and_their_batches_are_the_same_in_forked_workers(stores, tokenizer):
    plan = Plan(mixture_of(stores), tokenizer, num_steps=12, seed=1, **BUDGET)
    assert max(largest_error(plan, 200).values()) <= 1
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
    here = [dataset[i] for i in range(len(dataset))]  # the files are open before the workers fork
    fresh = PlannedDataset(plan, tokenizer=tokenizer, image_size=8, cache_bytes=0)
    loader = torch.utils.data.DataLoader(fresh, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for mine, theirs in zip(here, loader, strict=True):
        assert mine.keys == theirs.keys and not mine.skipped
        assert torch.equal(mine.pixel_values, theirs.pixel_values) and torch.equal(mine.input_ids, theirs.input_ids)
    again = [fresh[i] for i in range(len(fresh))]  # and the parent's handles still read
    assert all(torch.equal(a.pixel_values, b.pixel_values) for a, b in zip(here, again))


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_many_samples_show_is_stored_once(tmp_path, tokenizer, format):
    from fastvlm.data.shards import ShardWriter

    image, part = draw_png(1, (64, 64)), {"type": "image"}
    with ShardWriter(tmp_path / "tar", "train") as writer:
        for i in range(50):
            document = [part, {"type": "text", "text": f"a grey seven {i}"}]
            writer.write(f"s-{i}", {"document": document}, [image])
    store = pack(tmp_path / "tar", "train", out=tmp_path / "out", format=format)
    assert store.stat().st_size < 10 * len(image) < sum(p.stat().st_size for p in (tmp_path / "tar").glob("*.tar"))
    index, reader = load_index(tmp_path / "out", "train", tokenizer), ShardReader()
    assert all(index.read(i, reader).images == [image] for i in range(50))


def test_what_is_packed_into_an_lmdb_is_on_disk_long_before_the_end(tmp_path, monkeypatch):
    path, sizes, images = tmp_path / "train-00000.lmdb", [], [os.urandom(10_000) for _ in range(40)]

    def samples():
        for number, image in enumerate(images):
            sizes.append(path.stat().st_size)
            yield f"s-{number}", {"id": number}, {"0.png": image}

    monkeypatch.setattr(module, "COMMIT_BYTES", 50_000)
    module.write_lmdb(path, samples(), 400_000)
    assert all(size >= 10_000 * number - 60_000 for number, size in enumerate(sizes))
    store = open_store(path)
    assert [store.image(json.loads(store.record(i))["members"]["0.png"]) for i in range(len(store))] == images


@pytest.mark.parametrize("format", FORMATS)
def test_a_store_that_was_replaced_is_read_anew_and_its_old_index_is_not_used(sources, tmp_path, tokenizer, format):
    path = pack(sources["caption"], "train", out=tmp_path, format=format)
    assert load_index(tmp_path, "train", tokenizer).num_samples == 90
    held = open_store(path)
    pack(sources["caption"], "val", out=tmp_path / "other", format=format).replace(path)
    assert load_index(tmp_path, "train", tokenizer).num_samples == 12
    assert open_store(path) is not held


@pytest.mark.parametrize("format", FORMATS)
def test_a_byte_that_changed_after_indexing_is_noticed(sources, tmp_path, tokenizer, format):
    path = pack(sources["caption"], "train", out=tmp_path, format=format)
    index, reader = load_index(tmp_path, "train", tokenizer), ShardReader()
    image = index.read(7, reader).images[0]
    data = bytearray(path.read_bytes())
    data[bytes(data).index(image) + 40] ^= 1
    beside = tmp_path / "beside"
    beside.write_bytes(data)
    os.replace(beside, path)
    with pytest.raises(ValueError, match="caption-00007 changed after it was indexed"):
        index.read(7, reader)


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_store_ends_in_one_line_and_not_in_a_crash(sources, tmp_path, format):
    path = pack(sources["caption"], "train", out=tmp_path, format=format)
    os.truncate(path, path.stat().st_size // 2)
    # In a process of its own: reading behind the end of a mapped file kills it.
    code = f"from fastvlm.data.shards import scan_shard; print(scan_shard({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("([], '") and path.name in done.stdout, done.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_a_store_put_back_is_read_anew_though_it_has_the_size_and_the_time_of_the_broken_one(
    sources, tmp_path, tokenizer, format
):
    path = pack(sources["caption"], "train", out=tmp_path, format=format)
    whole, stat = path.read_bytes(), path.stat()
    path.write_bytes(bytes(4096) + whole[4096:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.warns(UserWarning, match=path.name):
        assert load_index(tmp_path, "train", tokenizer).num_samples == 0
    beside = tmp_path / "beside"
    beside.write_bytes(whole)
    os.utime(beside, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(beside, path)
    with pytest.raises(ValueError, match=f"{path.name}.idx.parquet is of other content .*; rebuild it with"):
        load_index(tmp_path, "train", tokenizer, rebuild=False)
    assert load_index(tmp_path, "train", tokenizer).num_samples == 90


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_store_is_refused_with_its_name(tmp_path, tokenizer, format):
    path = tmp_path / f"train-00000.{'lmdb' if format == 'lmdb' else 'h5'}"
    path.write_bytes(b"no store" * 2000)
    with pytest.warns(UserWarning, match=path.name):
        assert load_index(tmp_path, "train", tokenizer).num_samples == 0


def test_an_lmdb_of_ones_own_becomes_a_source_by_a_table_of_records(tmp_path, tokenizer):
    import lmdb

    env = lmdb.open(str(tmp_path / "train-00000.lmdb"), subdir=False, max_dbs=1)
    records = env.open_db(b"records")
    with env.begin(write=True) as transaction:
        transaction.put(b"photos/1", draw_png(1))
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what number is shown"}]},
            {"role": "assistant", "content": "seven"},
        ]
        for i in range(8):
            entry = {"key": f"q-{i}", "record": {"messages": turns}, "members": {"0.png": "photos/1"}}
            entry["members"] |= {2: {"0.png": "photos/2"}, 3: {"0.png": ""}}.get(i, {})
            entry["record"]["meta"] = {"from": "a\ud800" if i == 4 else "a"}
            data = {5: b"no json", 6: b'{"key": 6, "record": 7}'}.get(i, json.dumps(entry).encode())
            transaction.put(i.to_bytes(8, "big"), data, db=records)
    env.close()
    index = load_index(tmp_path, "train", tokenizer)
    assert index.num_images.tolist() == [1, 1, 0, 0, 0, 0, 0, 1] and not index.broken
    faults = index.faults.to_pylist()
    assert [row for row, fault in enumerate(faults) if not fault] == [0, 1, 7]
    assert faults[2].startswith("q-2: ") and "no image 'photos/2'" in faults[2]
    assert faults[5].startswith("train-00000.lmdb-5: ") and "record 5 is not {key, record, members}" in faults[5]
    assert index.read(7, ShardReader()).images == [draw_png(1)]
    with pytest.raises(ValueError, match="no image 'photos/2'"):
        index.read(2, ShardReader())
    os.utime(tmp_path / "train-00000.lmdb", ns=(1, 1))  # a copy of it keeps its index
    assert load_index(tmp_path, "train", tokenizer, rebuild=False).checksum == index.checksum


def test_a_broken_record_of_an_hdf5_file_costs_no_other(sources, tmp_path, tokenizer):
    import h5py

    path = pack(sources["caption"], "train", out=tmp_path, format="hdf5")
    with h5py.File(path, "r+") as file:
        file["records"][3] = json.dumps(json.loads(file["records"][3]) | {"members": {"0.png": 10_000}})
    index = load_index(tmp_path, "train", tokenizer)
    assert [row for row, fault in enumerate(index.faults.to_pylist()) if fault] == [3] and index.num_samples == 90
    assert "no image 10000" in index.faults[3].as_py() and index.key(89) == "caption-00089"


def test_without_h5py_the_error_names_the_extra(sources, tmp_path):
    code = "import sys; sys.modules['h5py'] = None; from fastvlm.data.stores import main; main()"
    arguments = [str(sources["caption"]), f"out={tmp_path}", "format=hdf5"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install '.[hdf5]'" in done.stderr


def test_a_store_that_lacks_its_reader_leaves_no_empty_index_behind(sources, tmp_path, tokenizer, monkeypatch):
    pack(sources["caption"], "train", out=tmp_path, format="hdf5")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ValueError, match=r"train-00000.h5 needs h5py; .*pip install .*hdf5"):
            load_index(tmp_path, "train", tokenizer)
    assert load_index(tmp_path, "train", tokenizer).num_samples == 90


def test_the_command_packs_every_split_and_refuses_a_folder_that_has_one(sources, tmp_path):
    command = [sys.executable, "-m", "fastvlm.data.stores", str(sources["chat"]), f"out={tmp_path}"]
    done = subprocess.run([*command, "format=lmdb"], capture_output=True, text=True)
    assert done.returncode == 0 and "train-00000.lmdb: 70 samples" in done.stdout and "12 samples" in done.stdout
    done = subprocess.run([*command, "format=hdf5"], capture_output=True, text=True)
    assert done.returncode == 1 and "would be there twice" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".lmdb", ".lmdb"]
