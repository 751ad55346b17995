"""Check that no two samples of a source have the same key."""

from __future__ import annotations

import contextlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastvlm.data.shard_cache import cache_folder
from fastvlm.data.source_index import SourceIndex, merged

NOTED_SAMPLES = 100_000


def check_keys(index: SourceIndex) -> None:
    """Raise ValueError if two samples have the same key.

    With millions of samples this takes seconds, so when a large index has passed, that is noted in the cache folder
    under its checksum (which covers the tars' headers, and so the keys).
    """
    note = cache_folder() / "index" / f"unique-{index.checksum}"
    if not index.num_samples or (index.num_samples > NOTED_SAMPLES and note.exists()):
        return
    hashes = np.empty(index.num_samples, dtype=np.uint64)
    for k, path in enumerate(index.sidecars):
        keys = merged(
            pq.ParquetFile(path, page_checksum_verification=True).read(columns=["key"], use_threads=False)["key"]
        )
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
    """Return a 64-bit hash of every string (uint64): the sum of (byte + 1) times a random word for its position."""
    offsets = np.frombuffer(keys.buffers()[1], np.int32)[keys.offset : keys.offset + len(keys) + 1]
    if not len(keys) or offsets[0] == offsets[-1]:
        return np.zeros(len(keys), np.uint64)
    text = np.frombuffer(keys.buffers()[2], np.uint8)[offsets[0] : offsets[-1]].astype(np.uint64) + np.uint64(1)
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    words = np.random.PCG64(0).random_raw(int(lengths.max()))
    text *= words[np.arange(len(text)) - np.repeat(starts, lengths)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(text)])  # modulo 2^64, so differences are exact
    return sums[starts + lengths] - sums[starts]
