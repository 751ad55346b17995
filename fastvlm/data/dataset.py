"""From planned steps to batches: read, decode and encode this rank's samples."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from fastvlm.batch import Batch, Sample
from fastvlm.data.collate import collate
from fastvlm.data.conversation import lay_out, tokenise
from fastvlm.data.decode import Opened, look_at
from fastvlm.data.features import FeatureStore, image_key
from fastvlm.data.kept_texts import text_key
from fastvlm.data.lengths import layouts_of, views_of
from fastvlm.data.plan import Plan
from fastvlm.data.prefetch import Prefetcher, has_remote
from fastvlm.data.rooms import Handed, Rooms
from fastvlm.data.shards import RawSample, ShardReader
from fastvlm.data.transforms import ImageTransform, decode_label_map, empty_views, lay_views
from fastvlm.data.validation import ValidationPlan
from fastvlm.tokens import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class _Opened:
    raw: RawSample
    ids: np.ndarray  # int32 (T,), slots included
    labels: np.ndarray
    views: list[int]  # number of views of each image that truncation leaves
    images: list[Opened]  # the same images, with only their headers read
    layouts: list[tuple[int, int, int, int]]  # of the same images: see Batch.layouts


class PlannedDataset(Dataset):
    """Map-style dataset: item `step * accumulate + micro` is this rank's micro-batch of that optimiser step.

    A sample that cannot be read is left out of its row, its key is logged and added to `Batch.skipped`, and all other
    samples stay in place. Encoded samples and decoded images are cached in memory until `cache_bytes` are used; nothing
    is evicted, because in repeated passes the oldest entry is the one needed next.

    Args:
        plan: the order; also provides `tokens_per_image` and `max_tokens`.
        tokenizer: the one the plan was made with.
        image_size: side of a view, pixels.
        transform: image file -> views, of `image_size` and with the tiles that the plan counts; None: padded squares.
        augment_seed: seed of augmentation, together with step, key and image; None: no augmentation. Kinds that a
            source does not allow are not applied to it, and sources with augmented images are not cached in memory.
        rank, world_size: this process takes rows `rank, rank + world_size, ...` of a step.
        accumulate: micro-batches per step; micro-batch a takes rows `a, a + accumulate, ...` of this rank's rows.
        max_skipped_share: maximum share of unreadable samples. Reading stops when a worker has met more than five
            standard deviations above this share of what it has read (of 100 samples if that is more): with a share of
            0.01, at 7 of its first 100 samples or 151 of 10,000.
        cache_bytes: memory for cached samples, per worker.
        features: read features from this store instead of images; the sample cache then holds their keys only.

    Raises:
        ValueError: rows do not divide among ranks and micro-batches; tiles, crops or mirrors of images with dense label
            maps; an augmentation that no source allows; while reading, too many unreadable samples.
    """

    def __init__(
        self,
        plan: Plan | ValidationPlan,
        *,
        tokenizer: Tokenizer,
        image_size: int,
        transform: ImageTransform | None = None,
        augment_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        max_skipped_share: float = 0.01,
        cache_bytes: int = 256 << 20,
        features: FeatureStore | None = None,
    ):
        if plan.batch_size % (world_size * accumulate):
            raise ValueError(
                f"{plan.where}batch_size={plan.batch_size} rows do not divide among {world_size} devices "
                f"(hardware.devices x hardware.num_nodes) and hardware.accumulate={accumulate}; make it a multiple of "
                f"{world_size * accumulate}"
            )
        self.plan, self.tokenizer, self.image_size = plan, tokenizer, image_size
        transform = transform or ImageTransform(image_size=image_size)
        assert transform.image_size == image_size
        self.augment_seed = augment_seed
        self._transforms = transforms_of(plan, transform, training=augment_seed is not None)
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.max_skipped_share, self.cache_bytes = max_skipped_share, cache_bytes
        self.features = features
        self._names = [s.name for s in plan.sources]
        self._reader = ShardReader()
        self._text_key = text_key(tokenizer)
        self._rooms: Rooms | None = None
        self._prefetcher: tuple[int, Prefetcher] | None = None  # (its process id, prefetcher)
        self._cache: dict[tuple[int, int], tuple[str, np.ndarray, np.ndarray, list, list[Tensor], list]] = {}
        self._cached_bytes, self._num_read = 0, 0
        self._skipped: list[str] = []

    def __len__(self) -> int:
        return self.plan.num_steps * self.accumulate

    def furnish(self, *, workers: int = 0, each: int = 4) -> None:
        """Read batches into reused memory (see `Rooms`); call this before the reading processes are forked.

        A room has space for a quarter more views than the first steps need. A batch that needs more gets fresh memory.

        Args:
            workers: processes that read, besides this one.
            each: rooms per process.
        """
        if self.features is None:
            first = [self.plan.step(i).rows for i in range(min(8, self.plan.num_steps))]
            views = max((sum(self._views(rows[self.rank :: self.world_size])) for rows in first), default=0)
            rows = self.plan.batch_size // (self.world_size * self.accumulate)
            pixels = 3 * self.image_size**2 * math.ceil(1.25 * views / self.accumulate)
            tokens = 5 * 8 * rows * self.plan.max_tokens
            with suppress(OSError):  # a system that does not overcommit memory: batches get fresh memory
                self._rooms = Rooms(num_bytes=pixels + tokens, processes=1 + workers, each=each)

    def __getitem__(self, index: int) -> Batch | Handed:
        number, micro = divmod(index, self.accumulate)
        self._look_ahead(number)
        step = self.plan.step(number)
        of_step = {"step": number, "num_answer_tokens": step.num_answer_tokens, "num_planned_images": step.num_images}
        mine = step.rows[self.rank :: self.world_size][micro :: self.accumulate]
        count, worker, place = sum(self._views(mine)), get_worker_info(), None
        if self._rooms is not None and 3 * self.image_size**2 * count <= self._rooms.num_bytes:
            place = self._rooms.take(worker.id + 1 if worker else 0)
        # Images are decoded into their final place: a worker hands over this very memory.
        if place is None:
            return self._read_rows(mine, self._room(count, shared=worker is not None), **of_step)
        room = lay_views(self._rooms.open(place, lent=worker is None), count, self.image_size)
        if worker is None:
            return self._read_rows(mine, room, **of_step)
        try:
            batch = self._read_rows(mine, room, **of_step)
            return Handed(batch, rooms=self._rooms, number=place)
        except BaseException:
            self._rooms.free(place)
            raise

    def _views(self, rows: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
        """Return the planned number of views of every sample in some rows."""
        return [int(self.plan.sources[source].images[row]) for planned in rows for source, row in planned]

    def _read_rows(
        self, planned_rows: Sequence[Sequence[tuple[int, int]]], room: Tensor, *, step: int, **of_step: int
    ) -> Batch:
        # Read and encode all samples before decoding any image: decoding flushes the CPU caches, and reading and
        # encoding the next sample with cold caches takes three times as long.
        opened = iter([self._try_open(source, row) for planned in planned_rows for source, row in planned])
        counts = iter(self._views(planned_rows))
        rows, skipped, filled = [], [], 0
        for planned in planned_rows:
            row = []
            for source, number in planned:
                ready, count = next(opened), next(counts)
                try:
                    out = room[filled : filled + count]
                    row.append(self.read(source, number, step=step, out=out, opened=ready))
                    filled += count
                except (OSError, ValueError) as error:
                    skipped.append(self._skip(source, number, error))
            rows.append(row)
        return collate(
            rows,
            sources=self.plan.names,
            pad_id=self.tokenizer.pad_id,
            image_size=self.image_size,
            step=step,
            **of_step,
            skipped=skipped,
            **{"pixel_values" if self.features is None else "features": room[:filled]},
        )

    def _look_ahead(self, step: int) -> None:
        if not any(has_remote(source.index) for source in self.plan.sources):
            return
        if self._prefetcher is None or self._prefetcher[0] != os.getpid():  # threads do not survive a fork
            ranks = {"rank": self.rank, "world_size": self.world_size}
            self._prefetcher = (os.getpid(), Prefetcher(self.plan, cache=self._reader.cache, **ranks))
        self._prefetcher[1].move_to(step)

    def __getstate__(self) -> dict:
        # A spawned process does not inherit the memory of rooms.
        return self.__dict__ | {"_prefetcher": None, "_rooms": None}

    def _room(self, count: int, *, shared: bool = False) -> Tensor:
        """Return uninitialised memory for `count` views, or for their features."""
        if self.features is None:
            return empty_views(count, self.image_size, shared=shared)
        return self.features.empty(count, shared=shared)

    def read(
        self,
        source: int,
        row: int,
        *,
        step: int = 0,
        out: Tensor | None = None,
        opened: _Opened | Exception | None = None,
    ) -> Sample:
        """Read a sample as the model takes it.

        Args:
            source, row: source number and row of its index.
            step: step for which it is read: augmentation differs from step to step.
            out: where to write its views, as many as the plan counts; None: fresh memory.
            opened: result of `_try_open`, if it has been called.

        Raises:
            OSError, ValueError: the sample cannot be read.
            RuntimeError: its cached features are lost.
        """
        self._num_read += 1
        name = self._names[source]
        if (kept := self._cache.get((source, row))) is not None:
            key, ids, labels, images, maps, layouts = kept
            if out is None:
                out = self._room(sum(count for _, count in images))
            start = 0
            for image, count in images:
                if self.features is None:
                    out[start : start + count].copy_(image)
                else:
                    self._read_features(image, out[start : start + count])
                start += count
            return Sample(key, name, ids, labels, list(out[:start]), list(maps), layouts)
        opened = opened or self._try_open(source, row)
        if isinstance(opened, Exception):
            raise opened
        raw, transform = opened.raw, self._transforms[source]
        if out is None:
            out = self._room(sum(opened.views))
        start, own = 0, []
        for i, (data, count) in enumerate(zip(raw.images, opened.views)):
            place = out[start : start + count]
            if self.features is None:
                seed = f"{self.augment_seed}/{step}/{name}/{raw.key}/{i}" if transform.augment else None
                transform(data, seed=seed, out=place, image=opened.images[i])
                own.append((place, count))
            else:
                own.append((image_key(data), count))
                self._read_features(own[-1][0], place, sound=lambda data=data: transform(data))
            start += count
        images = list(out[:start].unbind())
        maps = [decode_label_map(data) for data in raw.label_maps[: len(opened.views)]]
        if not transform.augment and self._cached_bytes < self.cache_bytes:
            kept_images = images if self.features is None else []
            size = 8 * len(opened.ids) + sum(t.numel() for t in (*kept_images, *maps)) + 1000
            if self._cached_bytes + size <= self.cache_bytes:
                if self.features is None:  # a view would keep its whole batch alive
                    own = [(place.clone(), count) for place, count in own]
                self._cache[source, row] = (raw.key, opened.ids, opened.labels, own, maps, opened.layouts)
                self._cached_bytes += size
        return Sample(raw.key, name, opened.ids, opened.labels, images, maps, opened.layouts)

    def _try_open(self, source: int, row: int) -> _Opened | Exception | None:
        """Read and encode a sample except for its pixels; return the error if that fails, None if it is cached."""
        if (source, row) in self._cache:
            return None
        measured = self.plan.sources[source]
        try:
            raw, text = measured.index.read_with_text(row, self._reader, key=self._text_key)
            if text is None:
                text = tokenise(raw.record, self.tokenizer)
            text = measured.source.edit_text(text, self.tokenizer)
            views = views_of(measured.index, row, self._transforms[source]) if measured.source.images else []
            slots = [v * self.plan.tokens_per_image for v in views]
            ids, labels, num_images, _ = lay_out(
                text, self.tokenizer, tokens_per_image=slots, max_tokens=self.plan.max_tokens
            )
            views = views[:num_images]
            images = [look_at(data) for data, _ in zip(raw.images, views)] if self.features is None else []
            layouts = layouts_of(measured.index, row, self._transforms[source]) if views else []
            return _Opened(raw, ids, labels, views, images, layouts[: len(views)])
        except (OSError, ValueError) as error:
            return error

    def _read_features(self, key: bytes, out: Tensor, *, sound: Callable[[], object] = lambda: None) -> None:
        """Write an image's features into `out`.

        Args:
            sound: raises if the image itself is broken, and so has no features.

        Raises:
            ValueError: from `sound`.
            RuntimeError: the features are lost. The sample must not be skipped: all were there before the first step.
        """
        try:
            self.features.read(key, out=out)
        except (KeyError, OSError) as error:
            sound()
            lost = f"{self.features.folder} has lost features ({error}); the same command writes them again"
            raise RuntimeError(lost) from None

    def _skip(self, source: int, row: int, error: Exception) -> str:
        key = f"{self._names[source]}/{self.plan.sources[source].index.key(row)}"
        self._skipped.append(key)
        log.warning("skipped %s: %s", key, error)
        allowed = self.max_skipped_share * max(self._num_read, 100)
        if len(self._skipped) > allowed + 5 * math.sqrt(allowed):  # a Poisson count deviates by the root of its mean
            raise ValueError(
                f"{len(self._skipped)} of {self._num_read} samples could not be read, more than chance explains with "
                f"data.max_skipped_share={self.max_skipped_share}: {', '.join(self._skipped[-10:])} (last: {error}); "
                "write these shards again, or raise the share"
            ) from error
        return key


def transforms_of(plan: Plan | ValidationPlan, transform: ImageTransform, *, training: bool) -> list[ImageTransform]:
    """Return the transform of every source: with the kinds of augmentation it allows, and with none outside training.

    Raises:
        ValueError: tiles, crops or mirrors of images with dense label maps; an augmentation that no source allows.
    """
    transforms = [transform.restricted(source.augment if training else ()) for source in plan.sources]
    for source, own in zip(plan.sources, transforms):
        kinds = [kind for kind in ("crop", "mirror") if own.augment and kind in own.augment.kinds]
        if any(suffix.endswith(".labels.png") for suffix in source.index.suffixes) and (own.tiles or kinds):
            what = "tiles" if own.tiles else f"augment.{kinds[0]}"
            raise ValueError(
                f"{plan.where}image.{what} would part the images of source {source.name} from their dense label maps; "
                f"take it out of the stage"
                f"{'' if own.tiles else f', or {kinds[0]} out of what the source allows (augment)'}"
            )
    for kind in transform.augment.kinds if training and transform.augment else ():
        if not any(kind in source.augment for source in plan.sources):
            first = plan.sources[0].name
            raise ValueError(
                f"{plan.where}image.augment.{kind}: no source of the mixture allows it; where no answer depends on it "
                f"set {plan.where}mixture.sources.{first}.augment=[{kind}], or take {kind} out of the stage"
            )
    return transforms
