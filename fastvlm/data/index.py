"""The index of a source: the sidecars of its shards as one table, so that order, shares and packs are known before
data is read. A sidecar that does not fit is rebuilt, or refused with the command that does.

    python -m fastvlm.data.index data/embedded/captions --tokenizer data/embedded/tokenizer --template roles
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from braceexpand import braceexpand

from fastvlm.data.remote import RemoteShard, is_remote, locate_shards, write_listing
from fastvlm.data.shard_cache import cache_folder
from fastvlm.data.shards import RawSample, ShardReader, find_shards, parse_sample
from fastvlm.data.sidecar import SCHEMA, Sidecar, build_all, open_sidecar
from fastvlm.tokens import Tokenizer

KEPT_SHARDS = 16  # a source's shards whose other columns are kept by a process
NOTED_SAMPLES = 100_000


class ShardRows:
    """All columns of one shard's index, as arrays: what reading its samples needs."""

    def __init__(self, path: Path, *, checksum: str):
        file = pq.ParquetFile(path, memory_map=True)
        if json.loads(file.schema_arrow.metadata[b"fastvlm"])["checksum"] != checksum:
            raise ValueError(f"{path} was written anew while it was in use; start again")
        table = file.read(columns=["key", "offset", "size", "crc32", "members"], use_threads=False)
        self.keys = merged(table["key"])
        self.offset, self.size, self.crc32 = (table[name].to_numpy() for name in ("offset", "size", "crc32"))
        members = merged(table["members"])
        flat = members.flatten()
        suffixes = flat.field("suffix").dictionary_encode()
        self.suffixes = suffixes.dictionary.to_pylist()
        self.member_start = members.offsets.to_numpy()
        self.member_suffix = suffixes.indices.to_numpy()
        self.member_offset, self.member_size = flat.field("offset").to_numpy(), flat.field("size").to_numpy()


@dataclass
class SourceIndex:
    """The index of one split of a source, over all its shards, as columns.

    Rows stand in shard order and, within a shard, in the order of the tar. int32 columns unless it says otherwise.
    Columns that only reading or a filter needs stay in the sidecars until they are asked for.
    """

    folder: Path | str | Sequence[str]  # as the source's path says
    split: str
    shards: list[str]  # path or URL
    files: list[str | RemoteShard]  # what a ShardReader takes
    sidecars: list[Path]
    checksums: list[str]  # of the shards
    suffixes: list[str]  # of all members
    start: np.ndarray  # int64 (shards + 1): shard k has rows start[k] .. start[k + 1]
    num_images: np.ndarray
    text_tokens: np.ndarray
    answer_tokens: np.ndarray
    types: pa.Array
    faults: pa.Array
    checksum: str  # over the shards' checksums and the tokenizer: what a plan's fingerprint rests on
    broken: dict[str, str]  # shard -> where it broke

    def __post_init__(self):
        self._rows: OrderedDict[int, ShardRows] = OrderedDict()

    @property
    def num_samples(self) -> int:
        return int(self.start[-1])

    @cached_property
    def shard(self) -> np.ndarray:
        """Index into `shards`, one a row."""
        return np.repeat(np.arange(len(self.shards), dtype=np.int32), np.diff(self.start))

    @cached_property
    def size(self) -> np.ndarray:
        """int64, bytes of every sample's span."""
        return self.column("size").to_numpy()

    @cached_property
    def crc32(self) -> np.ndarray:
        """uint32, of every sample's span."""
        return self.column("crc32").to_numpy()

    @cached_property
    def keys(self) -> pa.Array:
        return self.column("key")

    @cached_property
    def image_width(self) -> pa.Array:
        """Pixels of every image, a list a row."""
        return self.column("image_width")

    @cached_property
    def image_height(self) -> pa.Array:
        return self.column("image_height")

    @cached_property
    def numbers(self) -> pa.MapArray:
        return self.column("numbers")

    def column(self, name: str) -> pa.Array:
        """A column of all sidecars, read from them now."""
        read = lambda path: pq.ParquetFile(path).read(columns=[name], use_threads=False)[name]
        with ThreadPoolExecutor(4) as pool:
            chunks = [chunk for column in pool.map(read, self.sidecars) for chunk in column.chunks]
        return merged(pa.chunked_array(chunks, type=SCHEMA.field(name).type))

    def _locate(self, row: int) -> tuple[int, int, ShardRows]:
        """(shard, row in the shard, its columns); the columns of the shards read last are kept."""
        k = int(np.searchsorted(self.start, row, side="right")) - 1
        rows = self._rows.get(k)
        if rows is None:
            rows = ShardRows(self.sidecars[k], checksum=self.checksums[k])
            self._rows[k] = rows
            while len(self._rows) > KEPT_SHARDS:
                with contextlib.suppress(KeyError):  # another thread was faster
                    self._rows.popitem(last=False)
        return k, row - int(self.start[k]), rows

    def key(self, row: int) -> str:
        _, i, rows = self._locate(int(row))
        return rows.keys[i].as_py()

    def file(self, k: int) -> str | RemoteShard:
        """Shard k as a ShardReader takes it; a remote one with what its samples' checksums should be."""
        file = self.files[k]
        if isinstance(file, str):
            return file
        rows = self._locate(int(self.start[k]))[2] if self.start[k] < self.start[k + 1] else None
        return replace(file, spans=None if rows is None else (rows.offset, rows.size, rows.crc32))

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
            OSError: the shard is missing or cannot be had.
            ValueError: its bytes are not those that were indexed.
        """
        k, i, rows = self._locate(int(row))
        file = self.files[k]
        if not isinstance(file, str):
            file = replace(file, spans=(rows.offset, rows.size, rows.crc32))
        offset, key = int(rows.offset[i]), rows.keys[i].as_py()
        data = reader.read(file, offset, int(rows.size[i]))
        if zlib.crc32(data) != rows.crc32[i]:
            raise ValueError(f"{self.shards[k]}: {key} changed after it was indexed (CRC-32)")
        members = {}
        for m in range(int(rows.member_start[i]), int(rows.member_start[i + 1])):
            start = int(rows.member_offset[m]) - offset
            members[rows.suffixes[rows.member_suffix[m]]] = data[start : start + int(rows.member_size[m])]
        return parse_sample(key, members)

    def __getstate__(self) -> dict:
        lazy = ("_rows", "shard", "size", "crc32", "keys", "image_width", "image_height", "numbers")
        return {name: value for name, value in self.__dict__.items() if name not in lazy}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_rows": OrderedDict()}


def list_shards(folder: str | Path | Sequence[str], split: str, names: str | None = None) -> list[Path | RemoteShard]:
    """The shards `<split>-*.tar` of a folder; for train, those of the pattern or range `names` where one is given.
    Of shards that are named or lie elsewhere, see `locate_shards`.

    Raises:
        ValueError: a shard of a range is missing; a folder elsewhere cannot be listed.
    """
    plain = isinstance(folder, Path) or not (isinstance(folder, (list, tuple)) or is_remote(folder) or "{" in folder)
    if not plain or str(folder).endswith(".tar"):
        return locate_shards(folder, split, names if split == "train" else None)
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
    folder: str | Path | Sequence[str],
    split: str,
    tokenizer: Tokenizer,
    *,
    rebuild: bool = True,
    names: str | None = None,
) -> SourceIndex:
    """Open the index of `<folder>/<split>-*.tar`, of those that `names` names, or of shards that lie elsewhere.

    What is missing or stale is built.

    Raises:
        ValueError: no shards, two samples with one key, or, with `rebuild=False`, a sidecar that does not fit.
    """
    shards = list_shards(folder, split, names)
    folder = folder if isinstance(folder, (list, tuple)) or is_remote(folder) else Path(folder)
    if not shards:
        raise ValueError(
            f"{folder}: no shards {names or f'{split}-*.tar'}; write them with `python data/prepare.py`, "
            "or point the source's path at them"
        )
    fingerprint = tokenizer.fingerprint
    where = [s.url if isinstance(s, RemoteShard) else str(s) for s in shards]
    look = functools.partial(open_sidecar, fingerprint=fingerprint)
    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        found = list(pool.map(look, shards))
    missing = [i for i, (opened, _) in enumerate(found) if opened is None]
    if missing and not rebuild:
        which = f"--shards {names!r}" if names and split == "train" else f"--split {split}"
        raise ValueError(
            f"{where[missing[0]]}.idx.parquet is {found[missing[0]][1]}; rebuild it with `python -m fastvlm.data.index "
            f"{folder if not isinstance(folder, (list, tuple)) else where[missing[0]]} "
            f"{which} --tokenizer {tokenizer.path} --template {tokenizer.template.name}`"
        )
    if missing:
        with one_builder(where[0]):
            for i in list(missing):
                found[i] = look(shards[i])  # another process may have built it while we waited
            missing = [i for i in missing if found[i][0] is None]
            build_all([shards[i] for i in missing], tokenizer, label=f"{folder}, {split}")
        for i in missing:
            found[i] = look(shards[i])
            if found[i][0] is None:
                raise ValueError(
                    f"index of {where[i]} is {found[i][1]} right after it was built; is the shard being written?"
                )
    opened = [sidecar for sidecar, _ in found]
    headers, counts = [o.header for o in opened], [o.num_samples for o in opened]
    for place, header, count in zip(where, headers, counts):
        if header["broken"]:
            warnings.warn(
                f"{place}: {header['broken']}; {count} whole samples before the break are used, "
                "what follows is lost: write the shard again",
                stacklevel=2,
            )
    state = json.dumps([[h["checksum"] for h in headers], fingerprint, counts])
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index = SourceIndex(
        folder=folder,
        split=split,
        shards=where,
        files=[s if isinstance(s, RemoteShard) else str(s) for s in shards],
        sidecars=[o.path for o in opened],
        checksums=[h["checksum"] for h in headers],
        suffixes=sorted({suffix for o in opened for suffix in suffixes_of(o)}),
        start=start,
        **read_planned([o.path for o in opened], start),
        checksum=hashlib.sha256(state.encode()).hexdigest()[:16],
        broken={place: h["broken"] for place, h in zip(where, headers) if h["broken"]},
    )
    check_keys(index)
    return index


def suffixes_of(opened: Sidecar) -> list[str]:
    if "suffixes" in opened.header:
        return opened.header["suffixes"]
    return ShardRows(opened.path, checksum=opened.header["checksum"]).suffixes


def read_planned(sidecars: Sequence[Path], start: np.ndarray) -> dict[str, np.ndarray | pa.Array]:
    """The columns that a plan needs, filled shard by shard, so that hundreds of tables never stand beside them."""
    numbers = {name: np.empty(start[-1], dtype=np.int32) for name in ("num_images", "text_tokens", "answer_tokens")}
    codes = {name: np.empty(start[-1], dtype=np.int32) for name in ("type", "fault")}
    words: dict[str, dict[str, int]] = {name: {} for name in codes}

    def read(path: Path) -> pa.Table:
        file = pq.ParquetFile(path, read_dictionary=list(codes))
        return file.read(columns=[*numbers, *codes], use_threads=False)

    with ThreadPoolExecutor(4) as pool:
        for first in range(0, len(sidecars), 16):  # no more tables ahead than these
            for k, table in enumerate(pool.map(read, sidecars[first : first + 16]), start=first):
                for name, out in numbers.items():
                    out[start[k] : start[k + 1]] = table[name].to_numpy()
                for name, out in codes.items():
                    at = start[k]
                    for chunk in table[name].chunks:
                        known = words[name]
                        place = np.array(
                            [known.setdefault(w, len(known)) for w in chunk.dictionary.to_pylist()], np.int32
                        )
                        out[at : at + len(chunk)] = place[chunk.indices.to_numpy()]
                        at += len(chunk)
    small = lambda name: codes[name].astype(np.min_scalar_type(-max(1, len(words[name]))))
    coded = {
        name: pa.DictionaryArray.from_arrays(small(name), pa.array(list(words[name]), pa.string())) for name in codes
    }
    return numbers | {"types": coded["type"], "faults": coded["fault"]}


def check_keys(index: SourceIndex) -> None:
    """Refuse two samples with one key.

    With millions of samples this takes seconds, so that a large index found sound is noted in the cache folder under
    its checksum (which covers the tars' headers, and so the keys).
    """
    note = cache_folder() / "index" / f"unique-{index.checksum}"
    if not index.num_samples or (index.num_samples > NOTED_SAMPLES and note.exists()):
        return
    hashes = np.empty(index.num_samples, dtype=np.uint64)
    for k, path in enumerate(index.sidecars):
        keys = merged(pq.ParquetFile(path).read(columns=["key"], use_threads=False)["key"])
        hashes[index.start[k] : index.start[k + 1]] = hash_keys(keys)
    ordered = np.sort(hashes)
    if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        names: set[str] = set()
        for row in np.flatnonzero(np.isin(hashes, twice)).tolist():
            if (key := index.key(row)) in names:
                raise ValueError(
                    f"{index.folder}: key {key!r} stands twice in split {index.split}; give every sample its own key"
                )
            names.add(key)
    if index.num_samples > NOTED_SAMPLES:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def hash_keys(keys: pa.Array) -> np.ndarray:
    """A 64-bit hash of every string: uint64. Multilinear: the sum of (byte + 1) times a random word for its place."""
    offsets = np.frombuffer(keys.buffers()[1], np.int32)[keys.offset : keys.offset + len(keys) + 1]
    if not len(keys) or offsets[0] == offsets[-1]:
        return np.zeros(len(keys), np.uint64)
    text = np.frombuffer(keys.buffers()[2], np.uint8)[offsets[0] : offsets[-1]].astype(np.uint64) + np.uint64(1)
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    words = np.random.PCG64(0).random_raw(int(lengths.max()))
    text *= words[np.arange(len(text)) - np.repeat(starts, lengths)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(text)])  # modulo 2^64, so differences are exact
    return sums[starts + lengths] - sums[starts]


@contextlib.contextmanager
def one_builder(name: str) -> Iterator[None]:
    """Ranks that start together build an index once."""
    lock = None
    with contextlib.suppress(OSError):  # without a cache folder each builds its own, and the last one stays
        folder = cache_folder() / "index"
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f".{hashlib.sha256(name.encode()).hexdigest()[:20]}.lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def merged(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Build the index of a source's shards.")
    parser.add_argument("folder", help="folder, URL or brace pattern of the shards")
    parser.add_argument("--split", default="*", help="train, val or test; all of them unless told")
    parser.add_argument("--shards", help="a pattern or range of names where they are not <split>-*.tar")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--template", default="chatml")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.tokenizer, template=args.template)
    splits = ("train", "val", "test") if args.split == "*" else (args.split,)
    splits = ("train",) if args.shards else splits
    try:
        count = 0
        for split in splits:
            shards = list_shards(args.folder, split, args.shards)
            count += len(shards)
            build_all(shards, tokenizer, label=f"{args.folder}, {split}")
            for shard in shards:
                opened, reason = open_sidecar(shard, tokenizer.fingerprint)
                if opened is None:
                    raise ValueError(f"index of {shard} is {reason} right after it was built")
                table = pq.read_table(opened.path, columns=["text_tokens", "fault"])
                faults = sum(fault != "" for fault in table["fault"].to_pylist())
                print(
                    f"{opened.path}: {len(table)} samples, {pc.sum(table['text_tokens'])} text tokens, "
                    f"{faults} unreadable"
                )
        if not count:
            raise ValueError(f"{args.folder}: no shards {args.split}-*.tar")
        if Path(args.folder).is_dir():
            with contextlib.suppress(OSError):
                write_listing(args.folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
