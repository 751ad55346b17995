"""Split JSON, JSONL, CSV and parquet files and hub data sets into parts, and read the rows of a part.

Splitting scans a file once; a worker then reads only the bytes or row groups of its part. Text is never held in memory
as a whole, however large the part.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

from data.recipes.inputs import list_files
from data.recipes.record import Part

SPACE = re.compile(r"[ \t\r\n\ufeff]*")
BETWEEN = re.compile(r"[, \t\r\n]*")  # two rows of a JSON list
CHUNK = 1 << 22  # characters
FIRST = 20  # rows checked for a layout's keys: one malformed row does not mean the wrong layout
TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
# Names that published copies give the splits.
SPLIT_NAMES = {"train": ("train", "train2014"), "val": ("validation", "val", "val2014", "val2017"), "test": ("test",)}
KNOWN_SPLITS = {name for names in SPLIT_NAMES.values() for name in names}


def cut_rows(
    path: Path,
    *,
    split: str | Sequence[str] = "train",
    rows: int,
    needs: Sequence[str] = (),
    files: Sequence[str] = (),
    suffixes: Sequence[str] = SUFFIXES,
    options: dict | None = None,
    hub: str | None = None,
    streaming: bool = True,
) -> list[Part]:
    """Split the rows of a file, of a folder's files or of a hub data set into parts.

    Args:
        path: a file, a folder, or a hub id ("org/name") if no such path exists.
        split: selects the files of a folder of parquet (`train-*.parquet`, `train/`) and the hub's split. Several names
            are alternatives that copies use; the first that exists is taken.
        rows: rows per part.
        needs: keys that a row of this layout has; checked in the first rows.
        files: file names to look for in a folder; the first that exists is taken.
        suffixes: file types to accept.
        options: stored in every part.
        hub: the configuration's name on the hub; None if the recipe cannot take a hub id.
        streaming: read a hub data set while it downloads, one part per original file; else download it first.

    Raises:
        ValueError: nothing was found, or the file type or layout is wrong; names the file and, if known, the row.
    """
    options = dict(options or {})
    if not path.exists():
        if hub is None or path.is_absolute() or len(path.parts) > 2:
            raise ValueError(f"path={path} does not exist")
        return cut_hub(str(path), hub, split=split, rows=rows, needs=needs, options=options, streaming=streaming)
    parts: list[Part] = []
    base = 0
    for file in find_files(path, split=split, files=files, suffixes=suffixes):
        new, count = cut_file(file, rows, options | {"base": base})
        parts += new
        base += count
    if not parts:
        raise ValueError(f"{path}: no rows in it; an empty download?")
    check_layout(parts[0], needs)
    return parts


def check_layout(part: Part, needs: Sequence[str]) -> None:
    """Check that one of the first rows has all keys of the layout.

    Raises:
        ValueError: none of them has.
    """
    first: dict | None = None
    for _, row in islice(read_rows(part), FIRST):
        if all(key in row for key in needs):
            return
        first = row if first is None else first
    missing = next(key for key in needs if key not in first)
    has = ", ".join(map(str, list(first)[:8])) or "nothing"
    raise ValueError(f"{part.path}: row {part.start} has no `{missing}` (it has {has}); is this the right recipe?")


def find_files(
    path: Path,
    *,
    split: str | Sequence[str] = "train",
    files: Sequence[str] = (),
    suffixes: Sequence[str] = SUFFIXES,
) -> list[Path]:
    """Return a data set's files: the file itself, or of a folder the first of `files`, its parquet, or its only file.

    Raises:
        ValueError: no file of an accepted type or of this split, or several and no parquet.
    """
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"{path}: a file of another kind; known: {', '.join(suffixes)}")
        return [path]
    for name in files:
        if (path / name).is_file():
            return [path / name]
    found = list_files(path, suffixes)
    parquet = [f for f in found if f.suffix == ".parquet"]
    if parquet:
        names = [split] if isinstance(split, str) else list(split)
        said = {f: find_split(f, path, KNOWN_SPLITS.union(names)) for f in parquet}
        for name in names:
            if named := [f for f in parquet if said[f] == name]:
                return named
        if others := [f for f in parquet if said[f]]:
            raise ValueError(f"{path}: no parquet files of split {names[0]} ({others[0].name} is of another)")
        return parquet
    if len(found) != 1:
        what = ", ".join(f.name for f in found[:5]) + (", ..." if len(found) > 5 else "")
        hint = f"{len(found)} files ({what}); name one of them" if found else f"no {', '.join(suffixes)} in it"
        raise ValueError(f"path={path}: {hint}")
    return found


def find_split(file: Path, path: Path, known: Collection[str]) -> str:
    """Return the known split that a file's name begins with, else the one its folder is named after, else ""."""
    folder = "" if file.parent == path else file.parent.name
    return next((word for word in (re.split(r"[-_.]", file.name)[0], folder) if word in known), "")


def cut_file(path: Path, rows: int, options: dict) -> tuple[list[Part], int]:
    """Return the parts of one file and its number of rows."""
    if path.suffix.lower() == ".parquet":
        return cut_parquet(path, rows, options)
    kind = path.suffix.lower()[1:]
    if kind == "json" and first_character(path) == "{":
        with open(path, "rb") as file:  # JSON lines under another name are common
            try:
                json.loads(file.readline())
            except ValueError:
                raise ValueError(
                    f"{path}: holds one JSON object, not a list of rows; is this the right file?"
                ) from None
        kind = "jsonl"
    scan: Callable[[Path], tuple[array, list[str]]] = {"json": scan_json, "jsonl": scan_lines}.get(kind, scan_csv)
    offsets, header = scan(path)
    if header:
        options = options | {"header": header}
    count = len(offsets) - 1
    parts = []
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        spot = {"kind": kind, "from": offsets[start], "to": offsets[stop]}
        parts.append(Part(str(path), start, stop, options | spot))
    return parts, count


def first_character(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(4096).lstrip(" \t\r\n\ufeff")[:1]


def scan_json(path: Path) -> tuple[array, list[str]]:
    """Return the byte offset of each row of a JSON list and of the list's end, and an empty header.

    Raises:
        ValueError: the file is not a list, a row is not an object, or the JSON is broken; names the row's number.
    """
    decoder = json.JSONDecoder()
    offsets = array("q")
    with open(path, encoding="utf-8", newline="") as file:
        text, pos = "", 0
        counted, at = 0, 0  # characters of `text` already converted to bytes, and the byte offset after them
        size = CHUNK

        def read_more() -> bool:
            nonlocal text, pos, counted, at
            at += len(text[counted:pos].encode())
            try:
                more = file.read(size)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: after row {len(offsets)}: not UTF-8 ({error.reason})") from None
            text, pos, counted = text[pos:] + more, 0, 0
            return bool(more)

        def peek() -> str:
            """Return the next character that is not white space; "" at the end."""
            nonlocal pos
            while True:
                pos = SPACE.match(text, pos).end()
                if pos < len(text) or not read_more():
                    return text[pos : pos + 1]

        def mark() -> None:
            nonlocal counted, at
            at += len(text[counted:pos].encode())
            counted = pos
            offsets.append(at)

        if peek() != "[":
            what = f"starts with {text[pos : pos + 20]!r}" if text[pos:] else "is empty"
            raise ValueError(f"{path}: {what}, not a JSON list of rows")
        pos += 1
        while (character := peek()) != "]":
            row = len(offsets)
            while True:
                try:
                    value, end = decoder.raw_decode(text, pos)
                    # A number may continue in the next chunk; an object ends with its brace.
                    if end < len(text) or isinstance(value, dict) or not read_more():
                        break
                except ValueError as error:
                    size *= 2
                    if not read_more():
                        what = error.msg if isinstance(error, json.JSONDecodeError) and character else "it ends here"
                        raise ValueError(f"{path}: row {row} is not JSON ({what}); a cut download?") from None
            size = CHUNK
            if not isinstance(value, dict):
                raise ValueError(f"{path}: row {row} is of type {type(value).__name__}, not an object")
            mark()
            pos = end
            if peek() == ",":
                pos += 1
            elif peek() != "]":
                what = repr(peek()) if peek() else "the end of the file"
                raise ValueError(f"{path}: after row {row} stands {what}, not a comma; a cut download?")
        mark()
    return offsets, []


def scan_lines(path: Path) -> tuple[array, list[str]]:
    """Return the byte offset of each non-blank line and of the file's end, and an empty header."""
    offsets = array("q")
    at = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                offsets.append(at)
            at += len(line)
    offsets.append(at)
    return offsets, []


def scan_csv(path: Path) -> tuple[array, list[str]]:
    """Return the byte offset of each record and of the file's end, and the header.

    A quoted field may hold line breaks.
    """
    import csv

    csv.field_size_limit(1 << 30)
    offsets = array("q")
    at = 0

    def lines(file) -> Iterator[str]:
        nonlocal at
        for line in file:
            at += len(line)
            yield line.decode("utf-8-sig" if at == len(line) else "utf-8")

    with open(path, "rb") as file:
        reader = csv.reader(lines(file), delimiter=delimiter(path))
        try:
            header = [name.strip() for name in next(reader, [])]
            start = at
            for row in reader:
                if row:
                    offsets.append(start)
                start = at
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: row {len(offsets)}: {error}") from None
    offsets.append(at)
    return offsets, header


def delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def cut_parquet(path: Path, rows: int, options: dict) -> tuple[list[Part], int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None
    # Prefer to split between row groups, because a group is decompressed as a whole.
    starts, start, end = [0], 0, 0
    for group in range(meta.num_row_groups):
        size = meta.row_group(group).num_rows
        if end + size - start > rows and end > start:
            starts.append(start := end)
        while end + size - start >= 2 * rows:
            starts.append(start := start + rows)
        end += size
    stops = [*starts[1:], meta.num_rows]
    options = options | {"kind": "parquet"}
    return [Part(str(path), a, b, options) for a, b in zip(starts, stops) if b > a], meta.num_rows


def cut_hub(
    path: str, name: str, *, split: str | Sequence[str], rows: int, needs: Sequence[str], options: dict, streaming: bool
) -> list[Part]:
    split = split if isinstance(split, str) else choose_split(path, name, split)
    dataset = load_hub(path, name, split, streaming)
    features = dataset.features or {}
    missing = [key for key in needs if features and key not in features]
    if missing:
        raise ValueError(f"path={path}: {name or 'it'} has no column {missing[0]} (it has {', '.join(features)})")
    spot = {"kind": "hub", "name": name, "split": split, "streaming": streaming}
    if streaming:
        count = dataset.num_shards
        return [Part(path, i, i + 1, options | spot | {"of": count}) for i in range(count)]
    count = len(dataset)
    return [Part(path, i, min(i + rows, count), options | spot) for i in range(0, count, rows)]


def choose_split(path: str, name: str, wanted: Sequence[str]) -> str:
    """Return the first of the wanted splits that the hub's data set has.

    Raises:
        ValueError: it has none of them.
    """
    import datasets

    with asking_hub(path):
        there = datasets.get_dataset_split_names(path, name or None)
    for split in wanted:
        if split in there:
            return split
    raise ValueError(f"path={path}: no split {wanted[0]} (it has {', '.join(there)}); leave it out with splits=...")


@contextlib.contextmanager
def asking_hub(path: str) -> Iterator[None]:
    """Turn any error of the hub libraries into one line.

    Raises:
        ValueError: whatever went wrong.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  the libraries raise a dozen kinds, the network more
        words = next(iter(str(error).split("\n")), "") or type(error).__name__
        raise ValueError(f"path={path}: no such file or folder here, and the hub says: {words[:200]}") from None


def load_hub(path: str, name: str, split: str, streaming: bool):
    """Call `datasets.load_dataset` with images left as encoded bytes.

    Raises:
        ValueError: there is no such data set, configuration or split, or no network.
    """
    import datasets

    with asking_hub(path):
        dataset = datasets.load_dataset(path, name or None, split=split, streaming=streaming)
    if streaming:
        return dataset.decode(False)
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return dataset


def read_rows(part: Part) -> Iterator[tuple[tuple[int, ...], dict]]:
    """Yield (numbers, row) for each row of a part; the numbers identify the row in the source (for `make_key`).

    Raises:
        ValueError: a row is not JSON or not an object; names file and row.
    """
    options = part.options
    kind = options["kind"]
    if kind == "hub":
        dataset = load_hub(part.path, options["name"], options["split"], options["streaming"])
        if options["streaming"]:
            for number, row in enumerate(dataset.shard(num_shards=options["of"], index=part.start)):
                yield (part.start, number), row
        else:
            for number in range(part.start, part.stop):
                yield (number,), dataset[number]
        return
    rows = read_parquet(part) if kind == "parquet" else read_text(part, kind)
    for number, row in enumerate(rows, part.start):
        yield (options["base"] + number,), row


def read_parquet(part: Part) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(part.path) as file:
        groups, first, end = [], None, 0
        for group in range(file.metadata.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if end > part.start and begin < part.stop:
                groups.append(group)
                first = begin if first is None else first
        skip, left = part.start - (first or 0), part.stop - part.start
        try:
            for batch in file.iter_batches(batch_size=64, row_groups=groups):
                if skip >= len(batch):
                    skip -= len(batch)
                    continue
                batch = batch.slice(skip, left)
                skip, left = 0, left - len(batch)
                yield from batch.to_pylist()
                if not left:
                    return
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{part.path}: rows {part.start}..{part.stop}: {str(error).splitlines()[0]}") from None


def read_text(part: Part, kind: str) -> Iterator[dict]:
    if kind == "json":
        try:
            yield from read_json(part)
        except ValueError as error:
            raise ValueError(f"{part.path}: rows {part.start}..{part.stop}: {error}; did the file change?") from None
    elif kind == "jsonl":
        lines = (line for line in read_lines(part) if line.strip())
        for number, line in enumerate(lines, part.start):
            try:
                row = json.loads(line.rstrip(b"\n").removeprefix(b"\xef\xbb\xbf"))
            except ValueError as error:
                raise ValueError(f"{part.path}: row {number} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{part.path}: row {number} is of type {type(row).__name__}, not an object")
            yield row
    else:
        import csv

        csv.field_size_limit(1 << 30)
        header = part.options["header"]
        lines = (line.decode("utf-8") for line in read_lines(part))
        for row in csv.reader(lines, delimiter=delimiter(Path(part.path))):
            if row:
                extra = {None: row[len(header) :]} if len(row) > len(header) else {}
                yield dict(zip(header, row)) | extra


def read_json(part: Part) -> Iterator[dict]:
    """Yield the rows of a part of a JSON list.

    Raises:
        ValueError: a row is not JSON.
    """
    decoder, text, end, number = json.JSONDecoder(), "", 0, part.start
    with open(part.path, "rb") as file:
        file.seek(part.options["from"])
        rest = io.TextIOWrapper(file, encoding="utf-8", newline="")
        while number < part.stop:
            try:
                row, end = decoder.raw_decode(text, BETWEEN.match(text, end).end())
            except ValueError:
                if not (more := rest.read(max(CHUNK, len(text) - end))):
                    raise
                text, end = text[end:] + more, 0
                continue
            number += 1
            yield row


def read_lines(part: Part) -> Iterator[bytes]:
    """Yield the lines of a part, split only at \\n, as the scans do."""
    with open(part.path, "rb") as file:
        file.seek(part.options["from"])
        while file.tell() < part.options["to"] and (line := file.readline()):
            yield line
