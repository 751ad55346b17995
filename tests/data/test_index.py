from __future__ import annotations

import os
import pickle
import re
import shlex
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_world import make_record, write_source

from fastvlm.data import index as index_module
from fastvlm.data import sidecar as sidecar_module
from fastvlm.data import unique_keys
from fastvlm.data.conversation import encode_record
from fastvlm.data.index import load_index
from fastvlm.data.shards import ShardReader
from fastvlm.data.sidecar import build_index, sidecar
from fastvlm.data.source import Mixture, Source
from fastvlm.tokens import IGNORE_INDEX, Tokenizer


def test_lengths_in_the_index_are_those_of_the_encoded_record(sources, tokenizer):
    for kind, folder in sources.items():
        index = load_index(folder, "train", tokenizer)
        for row in range(index.num_samples):
            record, images = make_record(kind, row)
            for m in (1, 4):
                encoded = encode_record(record, tokenizer, tokens_per_image=m)
                assert len(encoded.input_ids) == index.text_tokens[row] + m * index.num_images[row]
                assert sum(label != IGNORE_INDEX for label in encoded.labels) == index.answer_tokens[row]
            assert index.num_images[row] == len(images)
            assert index.key(row) == f"{kind}-{row:05d}"
            assert index.image_width[row].as_py() == [8] * len(images)


def test_samples_are_read_at_their_offsets_in_any_order(sources, tokenizer):
    index, reader = load_index(sources["pages"], "train", tokenizer), ShardReader(max_open=2)
    for row in np.random.default_rng(0).permutation(index.num_samples):
        raw = index.read(int(row), reader)
        assert (raw.record, raw.images) == make_record("pages", int(row))
    assert len(reader._files) == 2


def test_a_copied_shard_keeps_its_index_and_a_changed_one_does_not(tmp_path, tokenizer):
    folder = write_source(tmp_path, "chat", 6)
    shard = folder / "train-00000.tar"
    before = load_index(folder, "train", tokenizer)
    inode = os.stat(sidecar(shard)).st_mtime_ns
    load_index(folder, "train", tokenizer, rebuild=False)
    assert os.stat(sidecar(shard)).st_mtime_ns == inode, "an untouched shard is not looked at again"
    os.utime(shard, ns=(1, 1))
    after = load_index(folder, "train", tokenizer, rebuild=False)
    assert after.checksum == before.checksum
    write_source(tmp_path, "chat", 6, start=1)
    assert load_index(folder, "train", tokenizer).checksum != before.checksum


def test_the_checksum_depends_on_content_and_tokenizer_and_not_on_the_folder(tmp_path, tokenizer, other_tokenizer):
    a = load_index(write_source(tmp_path / "a", "text", 5), "train", tokenizer)
    b = load_index(write_source(tmp_path / "b", "text", 5), "train", tokenizer)
    assert a.checksum == b.checksum
    assert load_index(tmp_path / "b", "train", other_tokenizer).checksum != a.checksum


def test_types_of_questions_are_in_the_index(sources, tokenizer):
    index = load_index(sources["chat"], "train", tokenizer)
    assert index.types[0].as_py() == "name,name"
    assert index.types[1].as_py() == "name"


def fill(folder, tokenizer):
    write_source(folder, "chat", 50)
    for shard in folder.glob("*.tar"):
        build_index(shard, tokenizer)
    return folder


def load_read_only(folder, tokenizer):
    """Load an index from a folder that cannot be written; return its checksum, its place and the reads of spans."""
    bind = f'mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && "$@"'
    script = (
        "import sys; from fastvlm.data import sidecar; from fastvlm.data.index import load_index\n"
        "from fastvlm.tokens import Tokenizer\n"
        "read, spans = sidecar.read_span, []\n"
        "sidecar.read_span = lambda *args: spans.append(args) or read(*args)\n"
        "index = load_index(sys.argv[1], 'train', Tokenizer(sys.argv[2], template='roles'))\n"
        "print(index.checksum, index.sidecars[0].parent, len(spans))"
    )
    command = ["unshare", "-rm", "sh", "-c", bind, "sh", sys.executable, "-c", script, str(folder), str(tokenizer.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "mount" in done.stderr and "Traceback" not in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_read_only_copy_with_other_times_is_read_in_full_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    folder = write_source(tmp_path / "copy", "chat", 6)
    checksum = load_index(folder, "train", tokenizer).checksum
    for time in (1, 2):
        os.utime(folder / "train-00000.tar", ns=(time, time))
        first, again = (load_read_only(folder, tokenizer) for _ in range(2))
        assert first[0] == checksum and first[2] == "6"
        assert again == [checksum, str(tmp_path / "cache/index"), "0"]


def test_where_a_folder_cannot_be_written_its_index_goes_into_the_cache_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    folder = write_source(tmp_path / "medium", "chat", 50)
    first, again = (load_read_only(folder, tokenizer) for _ in range(2))
    assert first[:2] == again[:2] and again[2] == "0"
    checksum, where, _ = first
    assert where == str(tmp_path / "cache/index")
    assert not list(folder.glob("*.parquet"))
    assert checksum == load_index(folder, "train", tokenizer).checksum


def test_columns_that_only_reading_needs_stay_in_their_files(tmp_path, tokenizer):
    index = load_index(fill(tmp_path, tokenizer), "train", tokenizer)
    assert not {"keys", "shard", "image_width"} & set(vars(index)) and not index._rows
    index.read(30, ShardReader())
    assert list(index._rows) == [1]
    assert pickle.loads(pickle.dumps(index)).read(30, ShardReader()).key == index.keys[30].as_py() == "chat-00030"


def test_an_index_written_anew_under_a_run_is_noticed(tmp_path, tokenizer):
    index = load_index(fill(tmp_path, tokenizer), "train", tokenizer)
    write_source(tmp_path, "text", 50)
    build_index(tmp_path / "train-00001.tar", tokenizer)
    with pytest.raises(ValueError, match=r"train-00001.tar.idx.parquet was written anew while it was in use"):
        index.read(30, ShardReader())


def test_lengths_by_another_tokenizer_written_between_look_and_read_are_refused(
    tmp_path, tokenizer, other_tokenizer, monkeypatch
):
    shards = fill(tmp_path, tokenizer)
    load_index(shards, "train", tokenizer)
    join = index_module.join_sidecars

    def join_late(opened, **options):
        build_index(tmp_path / "train-00001.tar", other_tokenizer)  # as another run over the same folder does
        return join(opened, **options)

    monkeypatch.setattr(index_module, "join_sidecars", join_late)
    with pytest.raises(ValueError, match=r"train-00001.tar.idx.parquet was written anew .* another tokenizer"):
        load_index(shards, "train", tokenizer)


def test_two_tokenizers_read_the_same_shards_and_neither_takes_the_others_index(tmp_path, tokenizer, other_tokenizer):
    first = load_index(write_source(tmp_path, "chat", 50), "train", tokenizer)
    before = [path.read_bytes() for path in first.sidecars]
    second = load_index(tmp_path, "train", other_tokenizer)
    assert [path.read_bytes() for path in first.sidecars] == before
    assert {path.parent for path in first.sidecars} == {tmp_path} != {path.parent for path in second.sidecars}
    for ours, sound in ((tokenizer, first), (other_tokenizer, second)):
        again = load_index(tmp_path, "train", ours, rebuild=False)
        assert again.checksum == sound.checksum and again.sidecars == sound.sidecars
        for row in range(50):
            encoded = encode_record(make_record("chat", row)[0], ours, tokens_per_image=1)
            assert again.text_tokens[row] + again.num_images[row] == len(encoded.input_ids)
    write_source(tmp_path, "chat", 50, start=1)  # now neither fits
    load_index(tmp_path, "train", other_tokenizer)
    third = load_index(tmp_path, "train", other_tokenizer, rebuild=False)
    assert {path.parent for path in third.sidecars} == {tmp_path}


def test_an_index_that_is_asked_for_takes_the_place_beside_the_shard(
    tmp_path, tokenizer, other_tokenizer, monkeypatch, capsys
):
    load_index(write_source(tmp_path, "chat", 6), "train", tokenizer)
    named = ["--tokenizer", str(other_tokenizer.path), "--template", other_tokenizer.template.name]
    monkeypatch.setattr(sys, "argv", ["index", str(tmp_path), *named])
    index_module.main()
    assert f"{sidecar(tmp_path / 'train-00000.tar')}: 6 samples" in capsys.readouterr().out
    assert load_index(tmp_path, "train", other_tokenizer, rebuild=False).sidecars[0].parent == tmp_path


@pytest.mark.parametrize("image_token", ["<|image|>", "<image>"])
def test_the_command_that_a_refusal_names_builds_the_index_that_was_missing(
    tmp_path, tokenizer, monkeypatch, image_token
):
    ours = Tokenizer(tokenizer.path, template="roles", image_token=image_token)
    write_source(tmp_path, "chat", 6)
    with pytest.raises(ValueError, match="is missing; rebuild it with") as refused:
        load_index(tmp_path, "train", ours, rebuild=False)
    command = shlex.split(re.search("`python -m (.*)`", str(refused.value))[1])
    assert ("--image-token" in command) == (image_token == "<image>")
    monkeypatch.setattr(sys, "argv", command)
    index_module.main()
    assert load_index(tmp_path, "train", ours, rebuild=False).num_samples == 6


def test_unless_told_the_command_indexes_every_split_that_is_there(tmp_path, tokenizer, monkeypatch):
    splits = ("train", "val", "testA", "testB")
    for number, split in enumerate(splits):
        write_source(tmp_path, "text", 3, split=split, start=10 * number)
    named = ["--tokenizer", str(tokenizer.path), "--template", tokenizer.template.name]
    monkeypatch.setattr(sys, "argv", ["index", str(tmp_path), *named])
    index_module.main()
    for split in splits:
        assert load_index(tmp_path, split, tokenizer, rebuild=False).num_samples == 3


def test_the_command_says_in_one_line_where_a_shard_breaks_and_what_it_cannot_use(tmp_path, tokenizer):
    shard = write_source(tmp_path, "chat", 10) / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:8000])
    index = [sys.executable, "-m", "fastvlm.data.index", str(tmp_path)]
    done = subprocess.run([*index, "--tokenizer", str(tokenizer.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("index ")]
    assert len(lines) == 1 and re.match(rf"warning: {shard}: .*; \d+ whole samples before the break", lines[0])
    done = subprocess.run([*index, "--tokenizer", "./no_such_folder"], capture_output=True, text=True)
    assert done.returncode == 2 and "no_such_folder" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("window_shards", "kept"), [(4, 16), (9, 18)])
def test_the_shards_read_last_stay_open_and_two_windows_of_them(tmp_path, tokenizer, window_shards, kept):
    source = Source("x", path=write_source(tmp_path, "text", 20, max_samples=1))
    Mixture({"x": source}, weights=None, unit="samples", window_shards=window_shards)
    index, reader = source.load("train", tokenizer), ShardReader()
    for row in (*range(kept), 0, kept):
        index.read(row, reader)
    assert list(index._rows) == [*range(2, kept), 0, kept]


def test_many_missing_indexes_are_built_by_many_processes_and_are_the_same(tmp_path, tokenizer, monkeypatch, capfd):
    one = fill(tmp_path / "one", tokenizer)
    many = write_source(tmp_path / "many", "chat", 50)
    monkeypatch.setattr(sidecar_module, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(sidecar_module, "SAY_EVERY", 0)
    a, b = load_index(one, "train", tokenizer), load_index(many, "train", tokenizer)
    assert a.checksum == b.checksum
    for x, y in zip(a.sidecars, b.sidecars):
        ours, theirs = pq.read_table(x), pq.read_table(y)
        assert ours.equals(theirs)
    assert f"{many}, train: index of 3 of 3 shards built" in capfd.readouterr().err


def test_a_large_index_is_searched_for_double_keys_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(unique_keys, "NOTED_SAMPLES", 10)
    folder = fill(tmp_path / "x", tokenizer)
    read = []
    hash_keys = unique_keys.hash_keys
    monkeypatch.setattr(unique_keys, "hash_keys", lambda keys: read.append(len(keys)) or hash_keys(keys))
    for _ in range(3):
        load_index(folder, "train", tokenizer)
    assert read == [20, 20, 10]
    twice = folder / "train-00003.tar"
    twice.write_bytes((folder / "train-00000.tar").read_bytes())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"key 'chat-000\d\d' stands twice"):
            load_index(folder, "train", tokenizer)


def test_different_keys_have_different_hashes_whatever_their_length_and_place():
    keys = ["", "a", "b", "aa", "ab", "ba", "a" * 200, *(f"k-{i}" for i in range(20_000))]
    hashes = unique_keys.hash_keys(pa.array(keys))
    assert len(set(hashes.tolist())) == len(keys)
    assert (unique_keys.hash_keys(pa.array(keys)[3:]) == hashes[3:]).all()
