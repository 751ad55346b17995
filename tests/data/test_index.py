from __future__ import annotations

import os

import numpy as np
from tiny_world import make_record, write_source

from fastvlm.data.conversation import encode_record
from fastvlm.data.index import load_index, sidecar
from fastvlm.data.shards import ShardReader
from fastvlm.tokens import IGNORE_INDEX


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
