"""Rows of files: the same rows however they are cut, and one clear line for a broken file."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.recipes import rows as module
from data.recipes.rows import cut_hub, cut_rows, read_rows

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROW = st.dictionaries(WORDS, st.one_of(WORDS, st.integers(), st.lists(WORDS, max_size=3)), max_size=4)


def read_all(path, rows, **settings):
    read = [pair for part in cut_rows(path, rows=rows, **settings) for pair in read_rows(part)]
    numbers = [number for number, _ in read]
    assert numbers == [(i,) for i in range(len(read))]
    return [row for _, row in read]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=9),
    indent=st.sampled_from([None, 1, "\t"]),
    ascii=st.booleans(),
    chunk=st.integers(1, 40),
    size=st.integers(1, 10),
)
def test_a_json_list_reads_as_json_loads_it_whatever_the_chunks(tmp_path_factory, rows, indent, ascii, chunk, size):
    path = tmp_path_factory.mktemp("json") / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    old, module.CHUNK = module.CHUNK, chunk
    try:
        assert read_all(path, size) == rows
    finally:
        module.CHUNK = old


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=9), size=st.integers(1, 10))
def test_json_lines_read_as_written_even_under_the_name_of_json(tmp_path_factory, rows, size):
    folder = tmp_path_factory.mktemp("lines")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
    for name in ("rows.jsonl", "rows.json"):
        (folder / name).write_text(text, encoding="utf-8")
        assert read_all(folder / name, size) == rows


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=9), size=st.integers(1, 10))
def test_a_csv_table_reads_as_the_library_reads_it(tmp_path_factory, rows, size):
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerows([("a", "b"), *rows])
    path.write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    assert read_all(path, size) == [{"a": a, "b": b} for a, b in rows]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_a_part_of_many_rows_is_never_held_in_memory(tmp_path, monkeypatch, name):
    rows = [{"text": f"{i} " + "x" * 1000} for i in range(2000)]
    text = {"json": json.dumps(rows), "jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    text["csv"] = "text\n" + "".join(row["text"] + "\n" for row in rows)
    (tmp_path / name).write_text(text[name.rpartition(".")[2]])
    monkeypatch.setattr(module, "CHUNK", 1 << 14)
    (part,) = cut_rows(tmp_path / name, rows=len(rows))
    tracemalloc.start()
    try:
        assert all(row == wanted for (_, row), wanted in zip(read_rows(part), rows, strict=True))
        assert tracemalloc.get_traced_memory()[1] < 300_000 < (tmp_path / name).stat().st_size // 5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("group", [1, 3, 7, 50])
@pytest.mark.parametrize("size", [1, 4, 10, 100])
def test_parquet_rows_do_not_depend_on_row_groups_or_parts(tmp_path, group, size):
    rows = [{"n": i, "words": [str(i)] * (i % 3)} for i in range(23)]
    pq.write_table(pa.Table.from_pylist(rows[:20]), tmp_path / "train-0.parquet", row_group_size=group)
    pq.write_table(pa.Table.from_pylist(rows[20:]), tmp_path / "train-1.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "validation-0.parquet")
    assert read_all(tmp_path, size) == rows
    assert max(p.stop - p.start for p in cut_rows(tmp_path, rows=size)) < 2 * size


@pytest.mark.parametrize("streaming", [True, False])
def test_the_datasets_library_gives_the_same_rows_with_images_as_bytes(tmp_path, streaming):
    import datasets

    # A folder stands for the hub here: load_dataset takes both, and there is no network.
    from tiny_world import draw_png

    pictures = [draw_png(i) for i in range(5)]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.Value("string")})
    data = {"images": [[{"bytes": p, "path": None}] for p in pictures], "texts": [str(i) for i in range(5)]}
    table = datasets.Dataset.from_dict(data, features=features)
    table.select(range(3)).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    table.select(range(3, 5)).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    settings = {"split": "train", "rows": 2, "options": {}, "streaming": streaming}
    parts = cut_hub(str(tmp_path), "", needs=("texts",), **settings)
    assert len(parts) == (2 if streaming else 3)
    read = [pair for part in parts for pair in read_rows(part)]
    assert [row["texts"] for _, row in read] == list("01234")
    assert [row["images"][0]["bytes"] for _, row in read] == pictures
    assert len({number for number, _ in read}) == 5
    with pytest.raises(ValueError, match="no column messages"):
        cut_hub(str(tmp_path), "", needs=("messages",), **settings)
    with pytest.raises(ValueError, match="the hub says"):
        cut_hub(str(tmp_path / "gone"), "", needs=(), **settings)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '[{"x": 1}, {"x": 2}, ["x"]]', "a.json: row 2 is of type list, not an object"),
        ("a.json", '[{"x": 1}, 12', "a.json: row 1 is of type int"),
        ("a.json", '[{"x": 1}, {"x": "cut', "a.json: row 1 is not JSON .*cut download"),
        ("a.json", '[{"x": 1} {"x": 2}]', "after row 0 stands '{', not a comma"),
        ("a.json", '[{"x": 1}', "after row 0 stands the end of the file"),
        ("a.json", '{\n"x": [1]}', "one JSON object, not a list"),
        ("a.json", '"x"', "not a JSON list"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "no rows in it"),
        ("a.jsonl", "\n\n", "no rows in it"),
        ("a.csv", "x,y\n", "no rows in it"),
        ("a.json", '[{"y": 1}]', "row 0 has no `x` .it has y.; is this the right recipe"),
        ("a.parquet", "PAR1", "not a whole parquet file"),
        ("a.tar", "x", "a file of another kind"),
        ("a.json", b'[{"x": "\xff"}]', "not UTF-8"),
    ],
)
def test_a_broken_file_is_one_line_with_file_and_row(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        cut_rows(path, rows=10, needs=("x",))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_lines_are_named_when_they_are_read(tmp_path):
    for line, words in (("{", "row 1 is not JSON"), ("3", "row 1 is of type int")):
        path = tmp_path / "a.jsonl"
        path.write_text(f'{{"x": 1}}\n{line}\n')
        (part,) = cut_rows(path, rows=10, needs=("x",))
        with pytest.raises(ValueError, match=words):
            list(read_rows(part))


def test_a_folder_with_several_tables_or_a_missing_path_says_what_to_name(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"2 files \(a.json, b.jsonl\); name one"):
        cut_rows(tmp_path, rows=1)
    with pytest.raises(ValueError, match="does not exist"):
        cut_rows(tmp_path / "c", rows=1)
    with pytest.raises(ValueError, match="does not exist"):
        cut_rows(tmp_path / "c", rows=1, hub="all")  # an absolute path is no hub id
