"""The opened index of a source: the sidecars of its shards as one table."""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import logging
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

from fastvlm.data.conversation import Text
from fastvlm.data.kept_texts import ShardTexts
from fastvlm.data.remote import RemoteShard
from fastvlm.data.shards import RawSample, ShardReader, parse_sample, sort_images
from fastvlm.data.sidecar import SCHEMA

log = logging.getLogger(__name__)
KEPT_SHARDS = 16  # shards of a source whose remaining columns a process keeps at least


class ShardRows:
    """The columns of one shard's index that reading its samples needs, as arrays.

    Raises:
        ValueError: the index is damaged, or was replaced since.
    """

    def __init__(self, path: Path, *, checksum: str):
        self.path, self.checksum = path, checksum
        self._texts: dict[str, ShardTexts | None] = {}
        with whole(path):
            file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
            table = file.read(columns=["key", "offset", "size", "crc32", "members"], use_threads=False)
        if json.loads(file.schema_arrow.metadata[b"fastvlm"])["checksum"] != checksum:
            raise ValueError(f"{path} was written anew while it was in use; start again")
        self.keys = merged(table["key"])
        self.offset, self.size, self.crc32 = (table[name].to_numpy() for name in ("offset", "size", "crc32"))
        members = merged(table["members"])
        flat = members.flatten()
        suffixes = flat.field("suffix").dictionary_encode()
        self.suffixes = suffixes.dictionary.to_pylist()
        self.member_start = members.offsets.to_numpy()
        self.member_suffix = suffixes.indices.to_numpy()
        self.member_offset, self.member_size = flat.field("offset").to_numpy(), flat.field("size").to_numpy()

    def text(self, i: int, key: str) -> Text | None:
        """Return the stored text of a sample; None if none is stored for this key (`text_key`)."""
        if key not in self._texts:
            self._texts[key] = None
            try:
                self._texts[key] = ShardTexts(self.path, key=key, checksum=self.checksum)
            except KeyError:
                pass
            except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
                log.warning("%s: its token ids cannot be read (%s); texts are tokenised anew", self.path, error)
        texts = self._texts[key]
        return None if texts is None else texts[i]


@dataclass
class SourceIndex:
    """The index of one split of a source, over all its shards, as columns.

    Rows are in shard order and, within a shard, in the order of the tar. Columns are int32 unless stated otherwise.
    Columns that only reading or a filter needs stay in the sidecars until they are asked for.
    """

    folder: Path | str | Sequence[str]  # the source's path
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
    checksum: str  # over the shards' checksums and the tokenizer; part of a plan's fingerprint
    broken: dict[str, str]  # shard -> where it broke
    kept_shards: int = KEPT_SHARDS

    def __post_init__(self):
        self._rows: OrderedDict[int, ShardRows] = OrderedDict()

    @property
    def num_samples(self) -> int:
        return int(self.start[-1])

    @cached_property
    def _starts(self) -> list[int]:
        return self.start.tolist()

    @cached_property
    def shard(self) -> np.ndarray:
        """Index into `shards` for every row: int32 (rows,)."""
        return np.repeat(np.arange(len(self.shards), dtype=np.int32), np.diff(self.start))

    @cached_property
    def size(self) -> np.ndarray:
        """Bytes of every sample's span: int64 (rows,)."""
        return self.column("size").to_numpy()

    @cached_property
    def crc32(self) -> np.ndarray:
        """CRC-32 of every sample's span: uint32 (rows,)."""
        return self.column("crc32").to_numpy()

    @cached_property
    def keys(self) -> pa.Array:
        """Key of every sample."""
        return self.column("key")

    @cached_property
    def image_width(self) -> pa.Array:
        """Width of every image in pixels, one list per row."""
        return self.column("image_width")

    @cached_property
    def image_height(self) -> pa.Array:
        """Height of every image in pixels, one list per row."""
        return self.column("image_height")

    @cached_property
    def numbers(self) -> pa.MapArray:
        """The numbers of every record's meta, by name."""
        return self.column("numbers")

    def column(self, name: str) -> pa.Array:
        """Read a column from all sidecars.

        Raises:
            ValueError: one is damaged.
        """

        def read(path: Path) -> pa.ChunkedArray:
            with whole(path):
                file = pq.ParquetFile(path, page_checksum_verification=True)
                return file.read(columns=[name], use_threads=False)[name]

        with ThreadPoolExecutor(4) as pool:
            chunks = [chunk for column in pool.map(read, self.sidecars) for chunk in column.chunks]
        return merged(pa.chunked_array(chunks, type=SCHEMA.field(name).type))

    def _locate(self, row: int) -> tuple[int, int, ShardRows]:
        """Return (shard, row in the shard, its columns); the columns of the last shards read are kept."""
        k = bisect.bisect_right(self._starts, row) - 1  # ten times as fast as numpy for one number
        rows = self._rows.get(k)
        if rows is None:
            rows = self._rows[k] = ShardRows(self.sidecars[k], checksum=self.checksums[k])
        with contextlib.suppress(KeyError):  # another thread was faster
            self._rows.move_to_end(k)
            while len(self._rows) > self.kept_shards:
                self._rows.popitem(last=False)
        return k, row - self._starts[k], rows

    def key(self, row: int) -> str:
        """Return the key of a row's sample."""
        _, i, rows = self._locate(int(row))
        return rows.keys[i].as_py()

    def file(self, k: int) -> str | RemoteShard:
        """Return shard k as ShardReader takes it; a remote shard with the checksums of its samples."""
        file = self.files[k]
        if isinstance(file, str):
            return file
        rows = self._locate(int(self.start[k]))[2] if self.start[k] < self.start[k + 1] else None
        return replace(file, spans=None if rows is None else (rows.offset, rows.size, rows.crc32))

    def number(self, name: str) -> np.ndarray:
        """Return a number of every sample, by name: float64 (rows,), NaN where a sample has none.

        `text_tokens`, `answer_tokens` and `num_images` are columns of the index, `width` and `height` minima over the
        sample's images; others come from the records' meta.
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
            OSError: the shard is missing or unavailable.
            ValueError: its bytes are not those that were indexed.
        """
        key, members = self._read_members(*self._locate(int(row)), reader)
        return parse_sample(key, {suffix: bytes(data) for suffix, data in members.items()})

    def text(self, row: int, *, key: str) -> Text | None:
        """Return the text stored of a sample for `key` (`text_key`), without reading the sample; None if there is none.

        Raises:
            ValueError: the index is damaged.
        """
        _, i, rows = self._locate(int(row))
        return rows.text(i, key)

    def read_with_text(self, row: int, reader: ShardReader, *, key: str) -> tuple[RawSample, Text | None]:
        """Like `read`, with the text stored for `key` (`text_key`), if any; the sample's record is then empty.

        Raises:
            OSError, ValueError: see `read`.
        """
        k, i, rows = self._locate(int(row))
        if (text := rows.text(i, key)) is None:
            return self.read(row, reader), None
        name, members = self._read_members(k, i, rows, reader)
        return RawSample(name, {}, *sort_images(members)), text

    def _read_members(self, k: int, i: int, rows: ShardRows, reader: ShardReader) -> tuple[str, dict[str, memoryview]]:
        """Return the key and members of row i of shard k, as views of the bytes read."""
        file = self.files[k]
        if not isinstance(file, str):
            file = replace(file, spans=(rows.offset, rows.size, rows.crc32))
        offset, key = int(rows.offset[i]), rows.keys[i].as_py()
        read = functools.partial(self._read_span, file, offset, int(rows.size[i]), reader, crc32=rows.crc32[i], key=key)
        try:
            data = read()
        except ValueError:
            if isinstance(file, str) or not reader.drop_damaged(file):
                raise
            data = read()
        data, members = memoryview(data), {}
        for m in range(int(rows.member_start[i]), int(rows.member_start[i + 1])):
            start = int(rows.member_offset[m]) - offset
            members[rows.suffixes[rows.member_suffix[m]]] = data[start : start + int(rows.member_size[m])]
        return key, members

    @staticmethod
    def _read_span(
        file: str | RemoteShard, offset: int, size: int, reader: ShardReader, *, crc32: int | np.integer, key: str
    ) -> bytes:
        data = reader.read(file, offset, size)
        if zlib.crc32(data) != crc32:
            name = file if isinstance(file, str) else file.url
            raise ValueError(f"{name}: {key} changed after it was indexed (CRC-32)")
        return data

    def __getstate__(self) -> dict:
        lazy = ("_rows", "_starts", "shard", "size", "crc32", "keys", "image_width", "image_height", "numbers")
        return {name: value for name, value in self.__dict__.items() if name not in lazy}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_rows": OrderedDict()}


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Turn errors of reading an index file into ValueErrors.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({what}); delete it, the next start builds it anew") from None


def merged(column: pa.ChunkedArray) -> pa.Array:
    """Return a chunked column as a single array."""
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
