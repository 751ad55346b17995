"""The index: a columnar sidecar beside each shard, so that order, shares and packs are known before data is read.

`<shard>.tar.idx.parquet` holds one row a sample. Its metadata names the shard's size and checksum, the tokenizer's
fingerprint and the format's version; a sidecar that does not fit is rebuilt, or refused with the command that does.

    python -m fastvlm.data.index data/embedded/captions --tokenizer data/embedded/tokenizer --template roles
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from braceexpand import braceexpand

from fastvlm.data.conversation import encode_record
from fastvlm.data.decode import measure_image
from fastvlm.data.shards import RawSample, ShardReader, find_shards, parse_sample, scan_shard
from fastvlm.tokens import IGNORE_INDEX, Tokenizer

FORMAT = 3
MEMBER = pa.struct([("suffix", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the sample's span in the tar, bytes; in a store the record's number
        ("size", pa.int64()),
        ("members", pa.list_(MEMBER)),
        ("num_images", pa.int32()),
        ("image_width", pa.list_(pa.int32())),  # as one sees it, EXIF orientation applied
        ("image_height", pa.list_(pa.int32())),
        ("text_tokens", pa.int32()),  # without image slots
        ("answer_tokens", pa.int32()),  # learned tokens
        ("type", pa.string()),
        ("numbers", pa.map_(pa.string(), pa.float64())),  # of the record's meta: ratings, similarity, ...
        ("crc32", pa.uint32()),  # of the span
        ("fault", pa.string()),  # why the sample cannot be read; "" for a sound one
    ]
)


def sidecar(shard: str | Path) -> Path:
    """Path of a shard's index."""
    return Path(f"{shard}.idx.parquet")


def checksum(offset: Sequence[int], size: Sequence[int], crc32: Sequence[int]) -> str:
    """SHA-256 over offset, size and CRC-32 of every span: content without the shard's modification time."""
    columns = [np.array(c, dtype="<i8").tobytes() for c in (offset, size, crc32)]
    return hashlib.sha256(b"".join(columns)).hexdigest()


def describe_sample(raw: RawSample, tokenizer: Tokenizer) -> dict:
    """The columns of a sample that depend on what is in it.

    Raises:
        ValueError: the record or an image's header cannot be read.
    """
    sizes = []
    for i, image in enumerate(raw.images):
        try:
            sizes.append(measure_image(image))
        except ValueError as error:
            raise ValueError(f"image {i} cannot be opened: {error}") from None
    # One slot an image, and not none: a text behind an image is then not the first token, which is never learned.
    encoded = encode_record(raw.record, tokenizer, tokens_per_image=1)
    meta = raw.record.get("meta") or {}
    kind = meta.get("type") or ",".join(meta.get("types") or ())
    return {
        "num_images": encoded.num_images,
        "image_width": [w for w, _ in sizes],
        "image_height": [h for _, h in sizes],
        "text_tokens": len(encoded.input_ids) - encoded.num_images,
        "answer_tokens": sum(label != IGNORE_INDEX for label in encoded.labels),
        "type": str(kind),
        "numbers": sorted(numbers_of(meta).items()),
        "fault": "",
    }


def numbers_of(meta: dict) -> dict[str, float]:
    """What filters can ask for: every number in the meta but ids; of `ratings` (name -> one a turn) the lowest."""
    lowest = {name: [r for r in turns or () if r is not None] for name, turns in (meta.get("ratings") or {}).items()}
    numbers = {name: min(turns) for name, turns in lowest.items() if turns}
    numbers |= {name: value for name, value in meta.items() if not name.endswith("id")}
    return {n: float(v) for n, v in numbers.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def build_index(shard: str | Path, tokenizer: Tokenizer) -> Path:
    """Read a shard once and write its sidecar; returns the sidecar's path.

    A broken tar is indexed up to the break, with a warning that says where it broke. A sample whose record or image
    cannot be read keeps its row, with the fault named, and no plan uses it.
    """
    shard = Path(shard)
    stat = shard.stat()
    spans, broken = scan_shard(shard)
    rows = []
    reader = ShardReader()
    for span in spans:
        data = reader.read(str(shard), span.offset, span.size)
        members = {suffix: data[o - span.offset : o - span.offset + n] for suffix, o, n in span.members}
        row = {
            "key": span.key,
            "offset": span.offset,
            "size": span.size,
            "members": [{"suffix": s, "offset": o, "size": n} for s, o, n in span.members],
            "crc32": zlib.crc32(data),
        }
        try:
            row |= describe_sample(parse_sample(span.key, members), tokenizer)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            nothing = {"num_images": 0, "image_width": [], "image_height": [], "text_tokens": 0, "answer_tokens": 0}
            row |= nothing | {"type": "", "numbers": [], "fault": f"{span.key}: {error}"[:300]}
        rows.append(row)
    reader.close()
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    columns = [table[c].to_pylist() for c in ("offset", "size", "crc32")]
    header = {
        "format": FORMAT,
        "shard_size": stat.st_size,
        "shard_mtime_ns": stat.st_mtime_ns,
        "checksum": checksum(*columns),
        "tokenizer": tokenizer.fingerprint,
        "broken": broken,
    }
    write_sidecar(shard, table, header)
    return sidecar(shard)


def write_sidecar(shard: Path, table: pa.Table, header: dict) -> None:
    part = sidecar(shard).with_name(f".{sidecar(shard).name}.{os.getpid()}")
    pq.write_table(table.replace_schema_metadata({"fastvlm": json.dumps(header)}), part, compression="zstd")
    os.replace(part, sidecar(shard))


def open_sidecar(shard: Path, fingerprint: str) -> tuple[pa.Table | None, dict, str]:
    """Read a shard's sidecar; returns (table, header, why it does not fit), the reason being "" when it does.

    Cheap: size and modification time are compared. Only where the time differs (a copy, a checkout) are the spans'
    checksums read once; when they agree, the new time is noted.
    """
    path = sidecar(shard)
    if not path.exists():
        return None, {}, "missing"
    try:
        table = pq.read_table(path, memory_map=False)
        header = json.loads(table.schema.metadata[b"fastvlm"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return None, {}, f"unreadable ({str(error).splitlines()[0]})"
    stat = shard.stat()
    if header.get("format") != FORMAT or not table.schema.equals(SCHEMA):
        return None, header, f"of format {header.get('format')}, this version writes {FORMAT}"
    if header["tokenizer"] != fingerprint:
        return None, header, f"made with tokenizer {header['tokenizer']}, this one is {fingerprint}"
    if header["shard_size"] != stat.st_size:
        return None, header, f"of a shard of {header['shard_size']} bytes, it has {stat.st_size}"
    if header["shard_mtime_ns"] != stat.st_mtime_ns:
        # The headers too: a sample that was appended lies in no span of the old index.
        spans, _ = scan_shard(shard)
        reader = ShardReader()
        offset, size = [span.offset for span in spans], [span.size for span in spans]
        crc32 = [zlib.crc32(reader.read(str(shard), span.offset, span.size)) for span in spans]
        if checksum(offset, size, crc32) != header["checksum"]:
            return None, header, "of other content (checksum)"
        header["shard_mtime_ns"] = stat.st_mtime_ns
        with contextlib.suppress(OSError):  # a read-only folder: the checksums are read again next time
            write_sidecar(shard, table, header)
    return table, header, ""


@dataclass
class SourceIndex:
    """The index of one split of a source, over all its shards, as columns.

    Rows stand in shard order and, within a shard, in the order of the tar. int32 columns unless it says otherwise.
    """

    folder: Path
    split: str
    shards: list[str]
    shard: np.ndarray  # index into `shards`
    offset: np.ndarray  # int64, bytes
    size: np.ndarray  # int64, bytes
    num_images: np.ndarray
    text_tokens: np.ndarray
    answer_tokens: np.ndarray
    crc32: np.ndarray  # uint32
    keys: pa.Array
    types: pa.Array
    numbers: pa.MapArray
    faults: pa.Array
    image_width: pa.Array
    image_height: pa.Array
    suffixes: list[str]
    member_start: np.ndarray  # int64 (num_samples + 1): the members of row i are member_start[i] .. member_start[i + 1]
    member_suffix: np.ndarray  # index into `suffixes`
    member_offset: np.ndarray  # int64, bytes
    member_size: np.ndarray  # int64, bytes
    checksum: str  # over the shards' checksums and the tokenizer: what a plan's fingerprint rests on
    broken: dict[str, str]  # shard -> where it broke

    @property
    def num_samples(self) -> int:
        return len(self.shard)

    def key(self, row: int) -> str:
        return self.keys[int(row)].as_py()

    def number(self, name: str) -> np.ndarray:
        """A number of every sample, by name: float64, NaN where a sample has none.

        `text_tokens`, `answer_tokens` and `num_images` are the index's own; `width` and `height` those of the smallest
        image; others come from the records' meta.
        """
        if name in ("text_tokens", "answer_tokens", "num_images"):
            return getattr(self, name).astype(np.float64)
        out = np.full(self.num_samples, np.nan)
        if name in ("width", "height"):
            lists = self.image_width if name == "width" else self.image_height
            values, offsets = lists.flatten().to_numpy(), lists.offsets.to_numpy()
            some = np.flatnonzero(np.diff(offsets))
            out[some] = np.minimum.reduceat(values, offsets[some]) if len(some) else []
            return out
        there = np.flatnonzero(pc.equal(self.numbers.keys, name).to_numpy(zero_copy_only=False))
        rows = np.searchsorted(self.numbers.offsets.to_numpy(), there, side="right") - 1
        out[rows] = self.numbers.items.to_numpy(zero_copy_only=False)[there]
        return out

    def read(self, row: int, reader: ShardReader) -> RawSample:
        """Read a sample at its offset.

        Raises:
            OSError: the shard is missing.
            ValueError: its bytes are not those that were indexed.
        """
        row = int(row)
        offset, size, key = int(self.offset[row]), int(self.size[row]), self.key(row)
        data = reader.read(self.shards[self.shard[row]], offset, size)
        if zlib.crc32(data) != self.crc32[row]:
            raise ValueError(f"{self.shards[self.shard[row]]}: {key} changed after it was indexed (CRC-32)")
        members = {}
        for i in range(int(self.member_start[row]), int(self.member_start[row + 1])):
            start = int(self.member_offset[i]) - offset
            members[self.suffixes[self.member_suffix[i]]] = data[start : start + int(self.member_size[i])]
        return parse_sample(key, members)


def list_shards(folder: str | Path, split: str, names: str | None = None) -> list[Path]:
    """The shards `<split>-*.tar` of a folder; for train, those of the pattern or range `names` where one is given.

    Raises:
        ValueError: a shard of a range is missing.
    """
    folder = Path(folder)
    if names is None or split != "train":
        return find_shards(folder, split)
    shards: set[Path] = set()
    for name in braceexpand(names):
        found = list(folder.glob(name))
        if not found and not any(c in name for c in "*?["):
            raise ValueError(f"{folder / name}: no such shard, and shards={names} names it; mend the range")
        shards.update(found)
    return sorted(shards)


def load_index(
    folder: str | Path, split: str, tokenizer: Tokenizer, *, rebuild: bool = True, names: str | None = None
) -> SourceIndex:
    """Open the index of `<folder>/<split>-*.tar`, or of the shards `names` names, building what is missing or stale.

    Raises:
        ValueError: no shards, two samples with one key, or, with `rebuild=False`, a sidecar that does not fit.
    """
    folder = Path(folder)
    shards = list_shards(folder, split, names)
    if not shards:
        raise ValueError(
            f"{folder}: no shards {names or f'{split}-*.tar'}; write them with `python data/prepare.py`, "
            "or point the source's path at them"
        )
    fingerprint = tokenizer.fingerprint
    tables, headers = [], []
    for shard in shards:
        table, header, reason = open_sidecar(shard, fingerprint)
        if table is None:
            if not rebuild:
                which = f"--shards {names!r}" if names and split == "train" else f"--split {split}"
                raise ValueError(
                    f"{sidecar(shard)} is {reason}; rebuild it with `python -m fastvlm.data.index {folder} "
                    f"{which} --tokenizer {tokenizer.path} --template {tokenizer.template.name}`"
                )
            build_index(shard, tokenizer)
            table, header, reason = open_sidecar(shard, fingerprint)
            if table is None:
                raise ValueError(f"{sidecar(shard)} is {reason} right after it was built; is the shard being written?")
        if header["broken"]:
            warnings.warn(
                f"{shard}: {header['broken']}; {len(table)} whole samples before the break are used, "
                "what follows is lost: write the shard again",
                stacklevel=2,
            )
        tables.append(table)
        headers.append(header)
    table = pa.concat_tables(tables).combine_chunks()
    column = lambda name, dtype=np.int32: table[name].to_numpy().astype(dtype, copy=False)
    keys, members = merged(table["key"]), merged(table["members"])
    if len(keys) and pc.count_distinct(keys).as_py() != len(keys):
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise ValueError(f"{folder}: key {twice!r} stands twice in split {split}; give every sample its own key")
    flat = members.flatten()
    suffixes = flat.field("suffix").dictionary_encode()
    state = json.dumps([[h["checksum"] for h in headers], fingerprint, [len(t) for t in tables]])
    return SourceIndex(
        folder=folder,
        split=split,
        shards=[str(s) for s in shards],
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [len(t) for t in tables]),
        offset=column("offset", np.int64),
        size=column("size", np.int64),
        num_images=column("num_images"),
        text_tokens=column("text_tokens"),
        answer_tokens=column("answer_tokens"),
        crc32=column("crc32", np.uint32),
        keys=keys,
        types=merged(table["type"]),
        numbers=merged(table["numbers"]),
        faults=merged(table["fault"]),
        image_width=merged(table["image_width"]),
        image_height=merged(table["image_height"]),
        suffixes=suffixes.dictionary.to_pylist(),
        member_start=members.offsets.to_numpy().astype(np.int64),
        member_suffix=suffixes.indices.to_numpy().astype(np.int32),
        member_offset=flat.field("offset").to_numpy().astype(np.int64),
        member_size=flat.field("size").to_numpy().astype(np.int64),
        checksum=hashlib.sha256(state.encode()).hexdigest()[:16],
        broken={str(s): h["broken"] for s, h in zip(shards, headers) if h["broken"]},
    )


def merged(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Build the index of a source's shards.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="*", help="train, val or test; all of them unless told")
    parser.add_argument("--shards", help="a pattern or range of names where they are not <split>-*.tar")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--template", default="chatml")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.tokenizer, template=args.template)
    shards = list_shards(args.folder, "train" if args.shards else args.split, args.shards)
    if not shards:
        raise SystemExit(f"{args.folder}: no shards {args.split}-*.tar")
    for shard in shards:
        table = pq.read_table(build_index(shard, tokenizer), columns=["text_tokens", "fault"])
        faults = sum(f != "" for f in table["fault"].to_pylist())
        print(
            f"{sidecar(shard)}: {len(table)} samples, {pc.sum(table['text_tokens'])} text tokens, {faults} unreadable"
        )


if __name__ == "__main__":
    main()
