"""Token ids stored with the index, so that reading a sample of images and text needs neither JSON nor a tokenizer.

They are columns of the sidecar and written with it. Its metadata names what they depend on: with another tokenizer,
template or end token they are ignored, and texts are tokenised when they are read. The ids are those of the text alone
(`conversation.Text`); image slots, system prompt and truncation belong to the plan and are applied when a sample is
read.

If text is a large part of a shard, no ids are stored: the sidecars of a remote source are fetched before the first
step, and would be as large as the shards.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastvlm.data.conversation import Text
from fastvlm.tokens import Tokenizer

VERSION = 1  # of the output of `tokenise`
KEPT_SHARE = 0.1  # maximum size of the ids in memory, as a share of the shard's bytes
COLUMNS = ("token_ids", "turns", "image_at")
NOTHING = np.zeros(0, dtype=np.int32)


def text_key(tokenizer: Tokenizer) -> str:
    """Return a key that changes whenever the same record could become another `Text`."""
    return f"{VERSION}-{tokenizer.fingerprint}-{tokenizer.end_id}-{tokenizer.document_end_id}"


class KeptTexts:
    """The texts of a shard, collected while it is indexed."""

    def __init__(self, tokenizer: Tokenizer, *, shard_size: int):
        self._room, self._key = KEPT_SHARE * shard_size, text_key(tokenizer)
        self._wide = len(tokenizer) > 1 << 16
        self._texts: list[Text] | None = []

    @property
    def key(self) -> str:
        """See `text_key`; empty if no texts are stored."""
        return "" if self._texts is None else self._key

    def add(self, text: Text | None) -> None:
        """Add the text of the next sample; None if it cannot be read."""
        if self._texts is None:
            return
        text = text or Text(NOTHING, NOTHING, NOTHING)
        self._room -= text.ids.size * (4 if self._wide else 2)
        self._texts.append(text)
        if self._room < 0:
            self._texts = None

    def columns(self) -> dict[str, pa.Array]:
        """Return lists of unsigned integers per sample, and whether it is a document; {} if no texts are stored."""
        if self._texts is None:
            return {}
        parts = {"token_ids": [t.ids for t in self._texts], "turns": [t.turns for t in self._texts]}
        parts["image_at"] = [t.image_at for t in self._texts]
        lists = {}
        for name, arrays in parts.items():
            offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
            values = np.concatenate([NOTHING, *arrays])
            values = values.astype(np.uint16 if values.max(initial=0) < 1 << 16 else np.uint32)
            lists[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
        return lists | {"document": pa.array([t.document for t in self._texts], pa.bool_())}


class ShardTexts:
    """The stored texts of a shard's samples, from its sidecar.

    Raises:
        OSError: the sidecar is broken.
        KeyError: it has no texts for this key.
    """

    def __init__(self, path: Path, *, key: str, checksum: str):
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        header = json.loads(file.schema_arrow.metadata[b"fastvlm"])
        if header.get("texts") != key or header["checksum"] != checksum:
            raise KeyError(key)
        table = file.read(columns=[*COLUMNS, "document"], use_threads=False)
        self._columns = []
        for name in COLUMNS:
            lists = table[name].combine_chunks() if table[name].num_chunks != 1 else table[name].chunk(0)
            self._columns.append((lists.offsets.to_numpy(), lists.flatten().to_numpy()))
        self._document = table["document"].to_numpy()

    def __getitem__(self, i: int) -> Text:
        ids, turns, image_at = (values[offsets[i] : offsets[i + 1]] for offsets, values in self._columns)
        return Text(ids, turns, image_at, document=bool(self._document[i]))
