"""Token ids kept beside the index: the same tensors as from tokenising each record as it is read."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_world import draw_png, train_tokenizer

from fastvlm.batch import Batch
from fastvlm.data import kept_texts
from fastvlm.data.conversation import encode_record, lay_out, tokenise, with_system_text
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.index import load_index
from fastvlm.data.kept_texts import text_key
from fastvlm.data.lengths import measure_source
from fastvlm.data.plan import Plan
from fastvlm.data.shards import ShardReader, ShardWriter
from fastvlm.data.sidecar import build_index, sidecar
from fastvlm.data.source import Mixture, Source
from fastvlm.tokens import IGNORE_INDEX, ROLES, TEMPLATES, Tokenizer

EMBEDDED = ("captions", "interleaved", "text", "text_qa", "short_qa", "reading", "charts", "long_form", "cells")
TENSORS = ("input_ids", "labels", "position_ids", "segment_ids", "source_ids", "pixel_values")


def encode_at_once(record, tokenizer, *, slots, max_tokens):
    """What `lay_out(tokenise(record))` must give, from the definition: pieces one behind the other."""
    template, pieces, spans, space = tokenizer.template, [], [], ""
    slots = iter(slots)
    put = lambda ids, learned: pieces.extend((i, i if learned else IGNORE_INDEX) for i in ids)

    def put_piece(piece):
        nonlocal space
        piece = space + piece
        space = " " if piece.endswith(" ") else ""
        put(tokenizer.encode_template(piece.removesuffix(" ")), False)

    def put_parts(content, learned):
        nonlocal space
        nothing = {"type": "text", "text": ""}
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or [nothing]:
            if part["type"] == "text" and part["text"]:
                put(tokenizer.encode_text(space + part["text"]), learned)
            elif template.space_before_image:
                put(tokenizer.encode_template(space), False)
            space = ""
            if part["type"] == "text":
                continue
            put(tokenizer.encode_template(template.image[0]), False)
            spans.append((len(pieces), len(pieces) + next(slots)))
            put([tokenizer.image_id] * (spans[-1][1] - spans[-1][0]), False)
            put(tokenizer.encode_template(template.image[1]), False)

    put(tokenizer.encode_template(template.start), False)
    if "document" in record:
        put_parts(record["document"], True)
        put([tokenizer.document_end_id], True)
    for message in record.get("messages", ()):
        role = message["role"]
        put_piece(template.before[role])
        put_parts(message["content"], role == "assistant")
        put([tokenizer.end_id] if role == "assistant" else [], True)
        put_piece(template.after[role])
        if role == "system":
            put_parts("", False)
    put(tokenizer.encode_template(space), False)
    cut = max_tokens
    for first, end in spans:
        cut = first if first < max_tokens < end else cut
    cut = cut if len(pieces) > max_tokens else len(pieces)
    ids, labels = [i for i, _ in pieces[:cut]], [label for _, label in pieces[:cut]]
    labels[:1] = [IGNORE_INDEX][: len(labels)]
    return ids, labels, sum(end <= cut for _, end in spans), len(pieces) - cut


words = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "<|image|>", "<|end|>the", "the digit shown", "é\n"]))
parts = st.lists(
    st.one_of(st.just({"type": "image"}), st.builds(lambda t: {"type": "text", "text": t}, words)), max_size=5
)
contents = st.one_of(words, parts)
message = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(ROLES), contents)
records = st.one_of(
    st.builds(lambda m: {"messages": m}, st.lists(message, max_size=5)), st.builds(lambda p: {"document": p}, parts)
)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A tokenizer for every template, and one whose template says something around an image and starts with nothing."""
    folder = tmp_path_factory.mktemp("templates")
    train_tokenizer(folder)
    every = [Tokenizer(str(folder), template=name) for name in TEMPLATES]
    framed = Tokenizer(str(folder), template="roles")
    framed.template = TEMPLATES["roles"].__class__(
        **{**vars(TEMPLATES["roles"]), "image": ("look: ", "!"), "before": {**framed.template.before, "assistant": ""}}
    )
    return [*every, framed]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=records, system=words, data=st.data())
def test_a_kept_text_gives_what_encoding_the_record_gives(templates, tmp_path_factory, record, system, data):
    tokenizer = data.draw(st.sampled_from(templates))
    kept = kept_texts.KeptTexts(tokenizer, shard_size=1 << 20)
    kept.add(None)
    kept.add(tokenise(record, tokenizer))
    file = tmp_path_factory.mktemp("kept") / "x.parquet"
    header = {"texts": kept.key, "checksum": "c"}
    pq.write_table(pa.table(kept.columns()).replace_schema_metadata({"fastvlm": json.dumps(header)}), file)
    text = kept_texts.ShardTexts(file, key=text_key(tokenizer), checksum="c")[1]
    for blind in (False, True):
        for named in (None, system) if "messages" in record else (None,):
            source = Source("x", path="x", system=named, images=not blind)
            edited, theirs = source.edit_text(text, tokenizer), source.edit(record)
            count = len(edited.image_at)
            slots = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
            whole = encode_at_once(theirs, tokenizer, slots=slots, max_tokens=10**9)
            for limit in (data.draw(st.integers(0, len(whole[0]))), len(whole[0])):
                ids, labels, *rest = lay_out(edited, tokenizer, tokens_per_image=slots, max_tokens=limit)
                wanted = encode_at_once(theirs, tokenizer, slots=slots, max_tokens=limit)
                assert (ids.tolist(), labels.tolist(), *rest) == wanted
                encoded = encode_record(theirs, tokenizer, tokens_per_image=slots, max_tokens=limit)
                assert (encoded.input_ids, encoded.labels, encoded.num_images, encoded.truncated) == wanted
    if "document" in record:
        with pytest.raises(ValueError, match="needs a conversation"):
            with_system_text(text, system, tokenizer)


def plan_of(path, tokenizer, **options):
    budget = {"tokens_per_image": 4, "max_tokens": 40, "max_images": 4, "batch_size": 4, "packing": False}
    source = Source("x", path=path, **options)
    return Plan(Mixture({"x": source}, weights={"x": 1}, unit="samples"), tokenizer, num_steps=6, **budget)


def batches_of(plan, tokenizer, **options) -> list[Batch]:
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=16, cache_bytes=0)
    dataset._text_key = options.get("text_key", dataset._text_key)
    return [dataset[i] for i in range(len(dataset))]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)
        assert (one.keys, one.skipped, one.layouts) == (other.keys, (), None)
        maps = [m for m in (one.label_maps, other.label_maps) if m is not None]
        assert len(maps) in (0, 2) and (not maps or torch.equal(*maps))


def refuse(*args, **options):
    raise AssertionError("a record was read")


@pytest.mark.parametrize("family", EMBEDDED)
def test_every_embedded_source_reads_the_same_with_and_without_kept_texts(family, embedded, tmp_path, monkeypatch):
    tokenizer = Tokenizer(str(embedded / "embedded" / "tokenizer"), template="roles")
    for shard in (embedded / "embedded" / family).glob("val-*.tar"):  # the smaller ones
        (tmp_path / shard.name.replace("val", "train")).write_bytes(shard.read_bytes())
    monkeypatch.setattr(kept_texts, "KEPT_SHARE", 10)
    plan = plan_of(tmp_path, tokenizer)
    without = batches_of(plan, tokenizer, text_key="another")
    monkeypatch.setattr("fastvlm.data.source_index.parse_sample", refuse)
    assert_equal(batches_of(plan, tokenizer), without)


@pytest.fixture
def folder(tmp_path):
    """Conversations with one image in front of the question."""
    with ShardWriter(tmp_path / "shards", "train", max_samples=15) as writer:
        for i in range(30):
            content = [{"type": "image"}, {"type": "text", "text": "what is shown here"}]
            answer = [{"type": "text", "text": f"a small {'grey ' * (i % 7)}digit"}]
            record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
            writer.write(f"x-{i:02d}", record, [draw_png(i, (64, 48))])
    return tmp_path / "shards"


def test_words_that_are_a_large_part_of_a_shard_are_not_kept(folder, tokenizer):
    few = load_index(folder, "train", tokenizer)
    assert all(few.read_with_text(row, ShardReader(), key=text_key(tokenizer))[1] is not None for row in range(30))
    with ShardWriter(folder / "long", "train") as writer:
        for i in range(3):
            writer.write(f"x-{i}", {"document": [{"type": "text", "text": "the digit shown " * 300}]})
    much = load_index(folder / "long", "train", tokenizer)
    raw, text = much.read_with_text(0, ShardReader(), key=text_key(tokenizer))
    assert text is None and raw.record["document"]


def test_samples_whose_texts_are_kept_are_cut_to_the_same_without_being_read(folder, tokenizer, monkeypatch):
    source = Source("x", path=folder)
    limits = {"name": "x", "split": "train", "tokens_per_image": 4, "max_tokens": 14, "max_images": 4}
    with monkeypatch.context() as patch:
        patch.setattr(kept_texts, "KEPT_SHARE", 0)
        read = measure_source(source, tokenizer, **limits)
    for shard in folder.glob("*.tar"):
        build_index(shard, tokenizer)
    monkeypatch.setattr(ShardReader, "read", refuse)
    kept = measure_source(source, tokenizer, **limits)
    assert kept.num_truncated == read.num_truncated > 0
    for name in ("rows", "length", "answer", "images"):
        assert np.array_equal(getattr(kept, name), getattr(read, name))


@pytest.mark.parametrize("what", ["none", "another end", "another version", "broken"])
def test_texts_that_do_not_fit_are_not_used(what, folder, tokenizer, monkeypatch, caplog):
    wanted = batches_of(plan_of(folder, tokenizer), tokenizer)
    for shard in folder.glob("*.tar"):
        path, table = sidecar(shard), pq.read_table(sidecar(shard))
        if what == "none":  # as they were written before there were any
            header = json.loads(table.schema.metadata[b"fastvlm"])
            header.pop("texts")
            table = table.drop_columns([*kept_texts.COLUMNS, "document"])
            pq.write_table(table.replace_schema_metadata({"fastvlm": json.dumps(header)}), path)
        elif what == "broken":
            column = pq.ParquetFile(path).metadata.row_group(0).column(len(pq.read_schema(path)) + 2)
            data = bytearray(path.read_bytes())
            at = column.data_page_offset + column.total_compressed_size - 3
            data[at] ^= 255
            path.write_bytes(data)
    if what == "another version":
        monkeypatch.setattr(kept_texts, "VERSION", 2)
    if what == "another end":
        tokenizer = Tokenizer(tokenizer.path, template="roles")
        tokenizer.document_end_id += 1
    plan = plan_of(folder, tokenizer)
    raw, text = plan.sources[0].index.read_with_text(3, ShardReader(), key=text_key(tokenizer))
    assert text is None and raw.record["messages"]
    assert_equal(batches_of(plan, tokenizer), wanted)
    assert ("cannot be read" in caplog.text) == (what == "broken")


def test_ids_above_two_bytes_and_texts_of_nothing_come_back_as_they_were(tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "__len__", lambda self: 1 << 20)
    kept = kept_texts.KeptTexts(tokenizer, shard_size=1 << 20)
    numbers = lambda *values: np.array(values, dtype=np.int32)
    kept.add(kept_texts.Text(numbers(70_000, 1 << 19), numbers(1), numbers(0, 2)))
    kept.add(kept_texts.Text(numbers(), numbers(), numbers(), document=True))
    columns = kept.columns()
    assert (
        columns["token_ids"].to_pylist() == [[70_000, 1 << 19], []]
        and columns["token_ids"].type.value_type.bit_width == 32
    )
    assert columns["document"].to_pylist() == [False, True]


def test_an_index_with_texts_is_as_large_as_it_says(folder, tokenizer, monkeypatch):
    (shard, _) = sorted(folder.glob("*.tar"))
    larger = build_index(shard, tokenizer).stat().st_size
    monkeypatch.setattr(kept_texts, "KEPT_SHARE", 0)
    assert 0 < larger - build_index(shard, tokenizer).stat().st_size < 0.2 * shard.stat().st_size
