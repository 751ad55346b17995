"""The pass over a plan's images that fills a feature store, before the first step."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvlm.data.collate import tiles_among
from fastvlm.data.features import FeatureStore, FeatureWriter
from fastvlm.data.plan import Plan
from fastvlm.data.planned_images import ImageKeys, ImageViews, plan_key, planned_samples
from fastvlm.data.transforms import ImageTransform
from fastvlm.data.validation import ValidationPlan


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work; `gather` lists what all of them pass, and is a barrier."""

    rank: int
    count: int
    gather: Callable[[object], list]


def fill(
    store: FeatureStore,
    plans: Sequence[Plan | ValidationPlan],
    *,
    encode: Callable[[Tensor, Tensor | None], Tensor],
    transform: ImageTransform,
    batch_size: int,
    where: str,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[object], list] = lambda value: [value],
    num_workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """Write what the store lacks of the plans' images; every rank writes a share.

    Safe to kill at any time and to run twice at once: the second run waits, and finds what the first has written.

    Args:
        encode: uint8 (I, 3, H, W) and which of them are tiles, bool (I,) -> features (I, N, D), on the CPU in the
            store's dtype.
        transform: encoded image -> its views; without augmentation.
        batch_size: images `encode` takes at once.
        where: the configuration's key, for messages.
        gather: what every rank passes, as all ranks see it; a barrier too.
        num_workers: loader processes of this rank.

    Returns:
        What was found and written, for the stage's record.

    Raises:
        ValueError: the disk has not enough room, or writing fails.
    """
    begun = time.monotonic()
    plans, ranks = list(plans), Ranks(rank, world_size, gather)
    chosen = [planned_samples(plan, transform) for plan in plans]
    name = plan_key(plans, chosen)
    samples = [(p, *sample) for p, found in enumerate(chosen) for sample in found]
    total = sum(len(views) for *_, views in samples)
    about = {"key": store.key, "folder": str(store.folder), "shape": list(store.shape), "dtype": str(store.dtype)}
    store.refresh()
    if all(gather(store.has_plan(name))):
        about |= {"images": total, "distinct": None, "written": 0, "bytes": 0, "unreadable": 0}
        say(f"features: all {total:,} images are in {store.folder}; no image is decoded")
        return about | {"seconds": time.monotonic() - begun}
    with only_writer(store, ranks, say=say):
        first = find_distinct(plans, samples, ranks, num_workers=num_workers)
        known = store.keys()
        missing = [at for key, at in first.items() if key not in known]
        num_views = sum(samples[number][3][k] for number, k in missing)
        (n, d), dtype, size = store.shape, str(store.dtype).removeprefix("torch."), num_views * store.view_bytes
        say(
            f"features: {total:,} planned images, {len(first):,} distinct, {len(first) - len(missing):,} in the cache; "
            f"writing {num_views:,} x {n} x {d} {dtype} = {size / 1e9:.2f} GB to {store.folder}"
        )
        check_disk(store, size, ranks, where=where)
        jobs = [(*samples[number][:3], k) for number, k in missing[rank::world_size]]
        views = load(ImageViews(plans, jobs, transform, batch_size), num_workers)
        line = ProgressLine(len(jobs), share=world_size, say=say)
        num_bytes, num_unreadable, num_written = (
            sum(column) for column in zip(*gather(write_features(store, views, encode=encode, line=line)))
        )
        store.refresh()
        lost = sum(key not in store for key in first)
        if any(gather(lost != num_unreadable)):
            raise ValueError(
                f"{where}=true: {store.folder} does not hold what all ranks wrote; "
                "FASTVLM_CACHE must be one folder for all of them"
            )
        about |= {"images": total, "distinct": len(first), "written": num_written, "bytes": num_bytes}
        about |= {"unreadable": num_unreadable, "seconds": time.monotonic() - begun}
        if rank == 0:
            store.note_plan(name, keys=set(first), about=about)
    skipped = f"; {num_unreadable:,} cannot be decoded and will be skipped" if num_unreadable else ""
    say(f"features: {num_written:,} written in {about['seconds']:.1f} s{skipped}")
    return about


@contextmanager
def only_writer(store: FeatureStore, ranks: Ranks, *, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other run writes into the store; inside it is prepared and what it holds is known."""
    begun, lock = time.monotonic(), None
    try:
        while True:  # and not a wait in the kernel: the other ranks' collectives must not time out
            lock = store.try_lock() if ranks.rank == 0 else None
            if ranks.gather(ranks.rank != 0 or lock is not None)[0]:
                break
            if time.monotonic() - begun < 2:
                say(f"features: waiting for another run that is writing {store.folder}")
            time.sleep(1)
        if ranks.rank == 0:
            store.prepare()
        ranks.gather(None)
        store.refresh()
        yield
    finally:
        if lock is not None:
            os.close(lock)


def find_distinct(plans: list, samples: list[tuple], ranks: Ranks, *, num_workers: int) -> dict[bytes, tuple[int, int]]:
    """Key of every image -> (sample number, image number) where it stands first; each rank reads a share."""
    mine = ImageKeys(plans, samples[ranks.rank :: ranks.count])
    keys = [
        (number * ranks.count + ranks.rank, k, key) for found in load(mine, num_workers) for number, k, key in found
    ]
    first: dict[bytes, tuple[int, int]] = {}
    for number, k, key in sorted(item for part in ranks.gather(keys) for item in part):
        first.setdefault(key, (number, k))
    return first


def check_disk(store: FeatureStore, size: int, ranks: Ranks, *, where: str) -> None:
    """Raises:
    ValueError: the disk has no room for so many bytes, with the key and what mends it.
    """
    free = ranks.gather(shutil.disk_usage(store.folder).free)[0]
    if size * 1.01 + (64 << 20) > free:
        raise ValueError(
            f"{where}=true would write {size / 1e9:.2f} GB to {store.folder}, where {free / 1e9:.2f} GB are free; "
            f"free some, set FASTVLM_CACHE to another disk, or {where}=false"
        )


def write_features(
    store: FeatureStore,
    batches: DataLoader,
    *,
    encode: Callable[[Tensor, Tensor | None], Tensor],
    line: ProgressLine,
) -> tuple[int, int, int]:
    """Encode and write; returns bytes written, images that could not be decoded, images written."""
    writer, unreadable, done = FeatureWriter(store), 0, 0
    for keys, counts, views, failed in batches:
        unreadable, done = unreadable + failed, done + len(keys) + failed
        if keys:
            writer.write(keys, counts, encode(views, tiles_among(counts)))
        line.show(done)
    writer.close()
    return writer.num_bytes, unreadable, done - unreadable


def load(dataset: Dataset, num_workers: int) -> DataLoader:
    """Its items in order. A generator of its own: the pass leaves the run's random numbers as they are."""
    ahead = 4 if num_workers else None
    options = {"num_workers": num_workers, "prefetch_factor": ahead, "generator": torch.Generator()}
    return DataLoader(dataset, batch_size=None, collate_fn=as_it_is, **options)


def as_it_is(item):
    return item


class ProgressLine:
    """How far a rank is, on one line of a terminal or every half minute anywhere else."""

    def __init__(self, total: int, *, share: int, say: Callable[[str], None]):
        self.total, self.share, self.say = total, share, say
        self.begun = self.shown = time.monotonic()

    def show(self, done: int) -> None:
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
