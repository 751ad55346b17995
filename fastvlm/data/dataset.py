"""Planned steps -> batches: reads, decodes and encodes what the plan names, on one rank."""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fastvlm.batch import Batch, Sample
from fastvlm.data.collate import collate
from fastvlm.data.conversation import encode_record, without_images
from fastvlm.data.features import FeatureStore, image_key
from fastvlm.data.plan import Plan
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
        features: read these in place of images; the sample cache then holds their keys, not the features themselves.

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
        features: FeatureStore | None = None,
    ):
        if plan.batch_size % (world_size * accumulate):
            raise ValueError(
                f"data.batch_size={plan.batch_size} rows do not divide among {world_size} devices (trainer.devices x "
                f"num_nodes) and data.accumulate={accumulate}; make it a multiple of {world_size * accumulate}"
            )
        self.plan, self.tokenizer, self.image_size = plan, tokenizer, image_size
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.max_skipped_share, self.cache_bytes = max_skipped_share, cache_bytes
        self.features = features
        self._names = [s.name for s in plan.sources]
        self._reader = ShardReader()
        self._cache: dict[tuple[int, int], tuple[str, np.ndarray, np.ndarray, list, list[Tensor], dict]] = {}
        self._cached_bytes, self._num_read = 0, 0
        self._skipped: list[str] = []

    def __len__(self) -> int:
        return self.plan.num_steps * self.accumulate

    def __getitem__(self, index: int) -> Batch:
        number, micro = divmod(index, self.accumulate)
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
            features=None if self.features is None else (self.features.shape, self.features.dtype),
        )

    def read(self, source: int, row: int) -> Sample:
        """A sample as the model takes it.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        self._num_read += 1
        name = self._names[source]
        if (kept := self._cache.get((source, row))) is not None:
            key, ids, labels, images, maps, meta = kept
            images = list(images) if self.features is None else self._read_features(images)
            return Sample(key, name, ids.tolist(), labels.tolist(), images, list(maps), meta)
        raw = self.plan.sources[source].index.read(row, self._reader)
        budget = {"tokens_per_image": self.plan.tokens_per_image, "max_tokens": self.plan.max_tokens}
        blind = self.plan.sources[source].blind
        encoded = encode_record(without_images(raw.record) if blind else raw.record, self.tokenizer, **budget)
        encoded_images = raw.images[: encoded.num_images]
        if self.features is None:
            images = kept = [decode_image(data, self.image_size) for data in encoded_images]
            kept_bytes = sum(t.numel() for t in images)
        else:
            kept = [image_key(data) for data in encoded_images]
            kept_bytes = 100 * len(kept)
            images = self._read_features(kept, encoded_images)
        maps = [decode_label_map(data) for data in raw.label_maps[: encoded.num_images]]
        meta = raw.record.get("meta") or {}
        size = 8 * len(encoded.input_ids) + kept_bytes + sum(t.numel() for t in maps) + 1000
        if self._cached_bytes + size <= self.cache_bytes:
            ids, labels = np.array(encoded.input_ids, np.int32), np.array(encoded.labels, np.int32)
            self._cache[source, row] = (raw.key, ids, labels, kept, maps, meta)
            self._cached_bytes += size
        return Sample(raw.key, name, encoded.input_ids, encoded.labels, images, maps, meta)

    def _read_features(self, keys: list[bytes], images: list[bytes] = ()) -> list[Tensor]:
        """Features of images, one (N, D) a view.

        Raises:
            ValueError: an image that cannot be decoded has none.
            RuntimeError: they were not written.
        """
        found = []
        for i, key in enumerate(keys):
            try:
                found += self.features.read(key)
            except (KeyError, OSError) as error:
                if isinstance(error, KeyError) and i < len(images):
                    decode_image(images[i], self.image_size)  # says what is wrong with it
                # No sample may be left out for it: the features were all there before the first step.
                raise RuntimeError(
                    f"{self.features.folder} has lost features ({error}); run again to write them"
                ) from None
        return found

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
