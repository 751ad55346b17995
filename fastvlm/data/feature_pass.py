"""The pass over a plan's images that fills a feature store before the first step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvlm.data.collate import tiles_among
from fastvlm.data.features import FeatureStore, FeatureWriter, image_key
from fastvlm.data.lengths import views_of
from fastvlm.data.plan import Plan
from fastvlm.data.shards import ShardReader
from fastvlm.data.transforms import ImageTransform
from fastvlm.data.validation import ValidationPlan

ROWS = 64  # samples a worker hashes at a time

Sample = tuple[int, int, list[int]]  # source number, row of its index, views of each image
# Views, uint8 (I, 3, H, W), and which of them are tiles, bool (I,), or None for none -> features (I, N, D) on the CPU.
Encode = Callable[[Tensor, Tensor | None], Tensor]


def planned_samples(plan: Plan | ValidationPlan, transform: ImageTransform) -> list[Sample]:
    """Return every sample of a plan that has images left after truncation, in shard order."""
    shift = 40  # rows of one source stay far below 2**40
    steps = (
        np.fromiter((source << shift | row for pairs in plan.step(i).rows for source, row in pairs), np.int64)
        for i in range(plan.num_steps)
    )
    codes = np.unique(np.concatenate([np.empty(0, np.int64), *steps]))
    samples = []
    for code in codes.tolist():
        source, row = code >> shift, code & (1 << shift) - 1
        left, views = int(plan.sources[source].images[row]), []
        for count in views_of(plan.sources[source].index, row, transform) if left else ():
            if left <= 0:
                break
            views.append(count)
            left -= count
        if views:
            samples.append((source, row, views))
    return samples


def plan_key(plans: Sequence[Plan | ValidationPlan], samples: Sequence[Sequence[Sample]]) -> str:
    """Return the name of a set of images: a hash of the indexes' checksums and the rows."""
    digest = hashlib.sha256()
    for plan, chosen in zip(plans, samples):
        digest.update(json.dumps([s.index.checksum for s in plan.sources]).encode())
        digest.update(json.dumps(chosen).encode())
    return digest.hexdigest()[:32]


class _Keys(Dataset):
    """Item i: [(sample number, image number, key), ...] of ROWS samples.

    What cannot be read is left to training, which skips, counts and reports it.
    """

    def __init__(self, plans: list, samples: list[tuple[int, int, int, list[int]]]):
        self.plans, self.samples, self.reader = plans, samples, ShardReader()

    def __len__(self) -> int:
        return -(-len(self.samples) // ROWS)

    def __getitem__(self, i: int) -> list[tuple[int, int, bytes]]:
        found = []
        for number in range(i * ROWS, min((i + 1) * ROWS, len(self.samples))):
            plan, source, row, views = self.samples[number]
            with contextlib.suppress(OSError, ValueError):
                raw = self.plans[plan].sources[source].index.read(row, self.reader)
                found += [(number, k, image_key(data)) for k, data in enumerate(raw.images[: len(views)])]
        return found


class _Views(Dataset):
    """Item i: keys, view counts and views (V, 3, H, W) of a batch of images, and how many could not be decoded."""

    def __init__(self, plans: list, jobs: list[tuple[int, int, int, int]], transform: ImageTransform, batch_size: int):
        self.plans, self.jobs, self.transform, self.batch_size = plans, jobs, transform, batch_size
        self.reader = ShardReader()

    def __len__(self) -> int:
        return -(-len(self.jobs) // self.batch_size)

    def __getitem__(self, i: int) -> tuple[list[bytes], list[int], Tensor | None, int]:
        keys, counts, views = [], [], []
        jobs = self.jobs[i * self.batch_size : (i + 1) * self.batch_size]
        for plan, source, row, k in jobs:
            with contextlib.suppress(OSError, ValueError):
                data = self.plans[plan].sources[source].index.read(row, self.reader).images[k]
                seen = self.transform(data)
                # The key of these very bytes, not of those that an earlier pass read here.
                keys.append(image_key(data))
                counts.append(len(seen))
                views.append(seen)
        return keys, counts, torch.cat(views) if views else None, len(jobs) - len(keys)


def fill(
    store: FeatureStore,
    plans: Sequence[Plan | ValidationPlan],
    *,
    encode: Encode,
    transform: ImageTransform,
    batch_size: int,
    where: str,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[object], list] = lambda value: [value],
    num_workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """Write the features that the store lacks for the plans' images; every rank writes a share.

    Safe to kill at any time and to run twice at once: the second run waits, and finds what the first has written.

    Args:
        encode: views -> features in the store's dtype.
        transform: encoded image -> its views, without augmentation.
        batch_size: images per call of `encode`.
        where: the configuration's key, for messages.
        gather: all-gather of an object over the ranks; also used as a barrier.
        num_workers: loader processes of this rank.
        say: prints a line.

    Returns:
        What was found and written, for the stage's record.

    Raises:
        ValueError: the disk has too little space, writing fails, or the ranks do not share the store.
    """
    begun = time.monotonic()
    plans, ranks = list(plans), Ranks(rank, world_size, gather)
    chosen = [planned_samples(plan, transform) for plan in plans]
    name = plan_key(plans, chosen)
    samples = [(p, *sample) for p, found in enumerate(chosen) for sample in found]
    total = sum(len(views) for *_, views in samples)
    about = {"key": store.key, "folder": str(store.folder), "shape": list(store.shape), "dtype": str(store.dtype)}
    about |= {"images": total, "distinct": None, "written": 0, "bytes": 0, "unreadable": 0}
    store.refresh()
    if all(gather(store.has_plan(name))):
        say(f"features: all {total:,} images are in {store.folder}; no image is decoded")
        return about | {"seconds": time.monotonic() - begun}
    loader = loader_options(num_workers)
    with alone(store, ranks, say=say):
        if rank == 0:
            store.prepare()
        gather(None)
        store.refresh()
        first = distinct_images(DataLoader(_Keys(plans, samples[rank::world_size]), **loader), ranks)
        jobs = missing_images(store, samples, first, ranks, where=where, say=say)[rank::world_size]
        line = ProgressLine(len(jobs), share=world_size, say=say)
        views = DataLoader(_Views(plans, jobs, transform, batch_size), **loader)
        written = np.sum(gather(write_features(store, views, encode=encode, line=line)), axis=0).tolist()
        about |= {"distinct": len(first), **dict(zip(("bytes", "unreadable", "written"), written))}
        check_written(store, first, about["unreadable"], ranks, where=where)
        about["seconds"] = time.monotonic() - begun
        if rank == 0:
            store.note_plan(name, keys=set(first), about=about)
    say(
        f"features: {about['written']:,} written in {about['seconds']:.1f} s"
        + (f"; {about['unreadable']:,} cannot be decoded and will be skipped" if about["unreadable"] else "")
    )
    return about


def loader_options(num_workers: int) -> dict:
    """Return the DataLoader options of both passes."""
    # Its own generator, so that the pass does not advance the run's random state.
    options = {"batch_size": None, "collate_fn": as_it_is, "generator": torch.Generator()}
    return options | {"num_workers": num_workers, "prefetch_factor": 4 if num_workers else None}


@dataclass(frozen=True)
class Ranks:
    """This rank, and how the ranks communicate."""

    rank: int
    world_size: int
    gather: Callable[[object], list]


@contextlib.contextmanager
def alone(store: FeatureStore, ranks: Ranks, *, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other run writes to the store, and lock others out meanwhile."""
    begun, lock = time.monotonic(), None
    try:
        while True:  # polls instead of blocking: the other ranks' collectives must not time out
            lock = store.try_lock() if ranks.rank == 0 else None
            if ranks.gather(ranks.rank != 0 or lock is not None)[0]:
                break
            if time.monotonic() - begun < 2:
                say(f"features: waiting for another run that is writing {store.folder}")
            time.sleep(1)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def distinct_images(found: Iterable[list[tuple[int, int, bytes]]], ranks: Ranks) -> dict[bytes, tuple[int, int]]:
    """Return the distinct images of all ranks: key -> (sample, image of the sample) of its first occurrence.

    Args:
        found: the items of `_Keys` for this rank's samples.
    """
    keys = [(number * ranks.world_size + ranks.rank, k, key) for part in found for number, k, key in part]
    first: dict[bytes, tuple[int, int]] = {}
    for number, k, key in sorted(item for part in ranks.gather(keys) for item in part):
        first.setdefault(key, (number, k))
    return first


def missing_images(
    store: FeatureStore,
    samples: Sequence[tuple[int, int, int, list[int]]],
    first: dict[bytes, tuple[int, int]],
    ranks: Ranks,
    *,
    where: str,
    say: Callable[[str], None],
) -> list[tuple[int, int, int, int]]:
    """Return what `_Views` must decode: each image the store lacks, as (plan, source, row, image of the sample).

    Args:
        samples: (plan, source, row, views of each image) of every planned sample.
        first: from `distinct_images`.

    Raises:
        ValueError: the disk has too little space for them.
    """
    known = store.keys()
    missing = [at for key, at in first.items() if key not in known]
    total = sum(len(views) for *_, views in samples)
    num_views = sum(samples[number][3][k] for number, k in missing)
    (n, d), dtype, size = store.shape, str(store.dtype).removeprefix("torch."), num_views * store.view_bytes
    say(
        f"features: {total:,} planned images, {len(first):,} distinct, {len(first) - len(missing):,} in the cache; "
        f"writing {num_views:,} x {n} x {d} {dtype} = {size / 1e9:.2f} GB to {store.folder}"
    )
    check_room(store, size, ranks, where=where)
    return [(*samples[number][:3], k) for number, k in missing]


def check_room(store: FeatureStore, size: int, ranks: Ranks, *, where: str) -> None:
    """Raise ValueError unless the disk has space for that many bytes and a little more."""
    free = ranks.gather(shutil.disk_usage(store.folder).free)[0]
    if size * 1.01 + (64 << 20) > free:
        raise ValueError(
            f"{where}=true would write {size / 1e9:.2f} GB to {store.folder}, where {free / 1e9:.2f} GB are free; "
            f"free some, set FASTVLM_CACHE to another disk, or {where}=false"
        )


def check_written(store: FeatureStore, keys: Iterable[bytes], unreadable: int, ranks: Ranks, *, where: str) -> None:
    """Raise ValueError if a rank does not see in the store what all ranks wrote."""
    store.refresh()
    lost = sum(key not in store for key in keys)
    if any(ranks.gather(lost != unreadable)):
        raise ValueError(
            f"{where}=true: {store.folder} does not hold what all ranks wrote; "
            "FASTVLM_CACHE must be one folder for all of them"
        )


def write_features(store: FeatureStore, views: Iterable, *, encode: Encode, line: ProgressLine) -> tuple[int, int, int]:
    """Encode and write the items of `_Views`; return (bytes, images that could not be decoded, images written)."""
    writer, unreadable, written = FeatureWriter(store), 0, 0
    for keys, counts, pixels, failed in views:
        unreadable, written = unreadable + failed, written + len(keys)
        if keys:
            writer.write(keys, counts, encode(pixels, tiles_among(counts)))
        line.show(written + unreadable)
    writer.close()
    return writer.num_bytes, unreadable, written


def as_it_is(item):
    """Return the item: a collate function that leaves it as it is."""
    return item


class ProgressLine:
    """Progress of a rank, on one line of a terminal, or in a new line every half minute anywhere else."""

    def __init__(self, total: int, *, share: int, say: Callable[[str], None]):
        self.total, self.share, self.say = total, share, say
        self.begun = self.shown = time.monotonic()

    def show(self, done: int) -> None:
        """Show that `done` images are done, if it is time for a new line."""
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if now - self.shown < (0.5 if terminal else 30) and not (terminal and done == self.total):
            return
        self.shown = now
        rate = done / (now - self.begun)
        left = int((self.total - done) / rate) if rate else 0
        of = f"{self.total:,}" + (f" of this rank, {self.share} ranks" if self.share > 1 else "")
        text = f"features: {done:,}/{of}  {rate * self.share:.0f} images/s  {left // 60}:{left % 60:02d} left"
        if terminal:
            print(f"\r{text:<78}", end="\n" if done == self.total else "", flush=True)
        else:
            self.say(text)
