"""The columns of a source that a plan needs, read shard by shard so that few tables are in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUMBERS = ("num_images", "text_tokens", "answer_tokens")
WORDS = ("type", "fault")
AHEAD = 16  # tables read ahead


def read_planned(
    sidecars: Sequence[Path], headers: Sequence[dict], start: np.ndarray
) -> dict[str, np.ndarray | pa.Array]:
    """Read `num_images`, `text_tokens` and `answer_tokens` (int32), `types` and `faults` (strings) of every sample.

    Args:
        headers: of the sidecars, as they were when found to fit.
        start: int64 (shards + 1): shard k has rows start[k] .. start[k + 1].

    Raises:
        ValueError: a sidecar was rewritten since, possibly with another tokenizer's lengths.
        OSError, pyarrow.ArrowException: one is damaged.
    """
    numbers = {name: np.empty(start[-1], dtype=np.int32) for name in NUMBERS}
    words = {name: WordColumn(start[-1]) for name in WORDS}
    for k, table in enumerate(read_tables(sidecars, headers)):
        for name, column in numbers.items():
            column[start[k] : start[k + 1]] = table[name].to_numpy()
        for name, column in words.items():
            column.fill(int(start[k]), table[name])
    return numbers | {"types": words["type"].array(), "faults": words["fault"].array()}


def read_tables(sidecars: Sequence[Path], headers: Sequence[dict]) -> Iterator[pa.Table]:
    """Yield the planned columns of each sidecar."""

    def read(path: Path, header: dict) -> pa.Table:
        file = pq.ParquetFile(path, read_dictionary=list(WORDS), page_checksum_verification=True)
        found = json.loads(file.schema_arrow.metadata[b"fastvlm"])
        if any(found[key] != header[key] for key in ("checksum", "tokenizer")):
            raise ValueError(
                f"{path} was written anew while it was in use, by a run with another tokenizer or for "
                "another shard; start again"
            )
        return file.read(columns=[*NUMBERS, *WORDS], use_threads=False)

    with ThreadPoolExecutor(4) as pool:
        for first in range(0, len(sidecars), AHEAD):
            yield from pool.map(read, sidecars[first : first + AHEAD], headers[first : first + AHEAD])


class WordColumn:
    """A column of few distinct strings, filled piece by piece; until it is complete, it holds int32 codes."""

    def __init__(self, length: int | np.integer):
        self.codes = np.empty(length, dtype=np.int32)
        self.known: dict[str, int] = {}

    def fill(self, start: int, column: pa.ChunkedArray) -> None:
        """Put a dictionary-encoded column at rows from `start` on."""
        for chunk in column.chunks:
            words = chunk.dictionary.to_pylist()
            codes = np.array([self.known.setdefault(word, len(self.known)) for word in words], np.int32)
            self.codes[start : start + len(chunk)] = codes[chunk.indices.to_numpy()]
            start += len(chunk)

    def array(self) -> pa.DictionaryArray:
        """Return the column with the smallest type of codes."""
        smallest = np.min_scalar_type(-max(1, len(self.known)))
        return pa.DictionaryArray.from_arrays(self.codes.astype(smallest), pa.array(list(self.known), pa.string()))
