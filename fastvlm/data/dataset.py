"""Planned steps -> batches: reads, decodes and encodes what the plan names, on one rank."""

from __future__ import annotations

import logging
import os

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fastvlm.batch import Batch, Sample
from fastvlm.data.collate import collate
from fastvlm.data.conversation import encode_record
from fastvlm.data.plan import Plan
from fastvlm.data.prefetch import Prefetcher, has_remote
from fastvlm.data.shards import ShardReader
from fastvlm.data.transforms import decode_image, decode_label_map
from fastvlm.data.validation import ValidationPlan
from fastvlm.tokens import Tokenizer

log = logging.getLogger(__name__)


class PlannedDataset(Dataset):
    """Map-style: item `step * accumulate + micro` is this rank's micro-batch of that optimiser step.

    A sample that cannot be read leaves its row shorter; its key goes into `Batch.skipped` and into the log, and nothing
    else moves. Encoded samples and decoded images are kept until `cache_bytes` are full, then kept no more: the order
    comes round in passes, so a cache that evicts would evict what comes next.

    Args:
        plan: the order; also says `tokens_per_image` and `max_tokens`.
        tokenizer: the one the plan was made with.
        image_size: side of the square images, pixels.
        rank, world_size: this process takes rows `rank, rank + world_size, ...` of a step.
        accumulate: micro-batches a step; micro-batch a takes rows `a, a + accumulate, ...` of the rank's.
        max_skipped_share: of the samples this worker has read (at least 100) so many may be unreadable.
        cache_bytes: for encoded samples, in each worker.

    Raises:
        ValueError: rows do not divide among ranks and micro-batches; while reading, too many unreadable samples.
    """

    def __init__(
        self,
        plan: Plan | ValidationPlan,
        *,
        tokenizer: Tokenizer,
        image_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        max_skipped_share: float = 0.01,
        cache_bytes: int = 256 << 20,
    ):
        if plan.batch_size % (world_size * accumulate):
            raise ValueError(
                f"data.batch_size={plan.batch_size} rows do not divide among {world_size} devices (trainer.devices x "
                f"num_nodes) and data.accumulate={accumulate}; make it a multiple of {world_size * accumulate}"
            )
        self.plan, self.tokenizer, self.image_size = plan, tokenizer, image_size
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.max_skipped_share, self.cache_bytes = max_skipped_share, cache_bytes
        self._names = [s.name for s in plan.sources]
        self._reader = ShardReader()
        self._prefetcher: tuple[int, Prefetcher] | None = None  # and the process it works in
        self._cache: dict[tuple[int, int], tuple[str, np.ndarray, np.ndarray, list[Tensor], list[Tensor], dict]] = {}
        self._cached_bytes, self._num_read = 0, 0
        self._skipped: list[str] = []

    def __len__(self) -> int:
        return self.plan.num_steps * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        number, micro = divmod(index, self.accumulate)
        self._look_ahead(number)
        step = self.plan.step(number)
        rows, skipped = [], []
        for planned in step.rows[self.rank :: self.world_size][micro :: self.accumulate]:
            row = []
            for source, number_in_index in planned:
                try:
                    row.append(self.read(source, number_in_index))
                except (OSError, ValueError) as error:
                    skipped.append(self._skip(source, number_in_index, error))
            rows.append(row)
        return collate(
            rows,
            sources=self.plan.names,
            pad_id=self.tokenizer.pad_id,
            image_size=self.image_size,
            num_answer_tokens=step.num_answer_tokens,
            step=number,
            skipped=skipped,
        )

    def _look_ahead(self, step: int) -> None:
        if not any(has_remote(source.index) for source in self.plan.sources):
            return
        if self._prefetcher is None or self._prefetcher[0] != os.getpid():  # threads do not follow a fork
            ranks = {"rank": self.rank, "world_size": self.world_size}
            self._prefetcher = (os.getpid(), Prefetcher(self.plan, cache=self._reader.cache, **ranks))
        self._prefetcher[1].move_to(step)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_prefetcher": None}

    def read(self, source: int, row: int) -> Sample:
        """A sample as the model takes it.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        self._num_read += 1
        name = self._names[source]
        if (kept := self._cache.get((source, row))) is not None:
            key, ids, labels, images, maps, meta = kept
            return Sample(key, name, ids.tolist(), labels.tolist(), list(images), list(maps), meta)
        raw = self.plan.sources[source].index.read(row, self._reader)
        budget = {"tokens_per_image": self.plan.tokens_per_image, "max_tokens": self.plan.max_tokens}
        encoded = encode_record(self.plan.sources[source].source.edit(raw.record), self.tokenizer, **budget)
        images = [decode_image(data, self.image_size) for data in raw.images[: encoded.num_images]]
        maps = [decode_label_map(data) for data in raw.label_maps[: encoded.num_images]]
        meta = raw.record.get("meta") or {}
        size = 8 * len(encoded.input_ids) + sum(t.numel() for t in (*images, *maps)) + 1000
        if self._cached_bytes + size <= self.cache_bytes:
            ids, labels = np.array(encoded.input_ids, np.int32), np.array(encoded.labels, np.int32)
            self._cache[source, row] = (raw.key, ids, labels, images, maps, meta)
            self._cached_bytes += size
        return Sample(raw.key, name, encoded.input_ids, encoded.labels, images, maps, meta)

    def _skip(self, source: int, row: int, error: Exception) -> str:
        key = f"{self._names[source]}/{self.plan.sources[source].index.key(row)}"
        self._skipped.append(key)
        log.warning("skipped %s: %s", key, error)
        if len(self._skipped) > self.max_skipped_share * max(self._num_read, 100):
            raise ValueError(
                f"{len(self._skipped)} of {self._num_read} samples could not be read, more than "
                f"data.max_skipped_share={self.max_skipped_share}: {', '.join(self._skipped[-10:])} (last: {error}); "
                "write these shards again, or raise the share"
            ) from error
        return key
