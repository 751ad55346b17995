"""Prefetching: fetch the shards that a plan needs next into the shard cache while the current ones are read."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, deque
from contextlib import suppress

import numpy as np

from fastvlm.data.plan import Plan
from fastvlm.data.remote import RemoteShard
from fastvlm.data.shard_cache import ShardCache
from fastvlm.data.validation import ValidationPlan

THREADS = 2


class Prefetcher:
    """Looks ahead in a plan until it has found as many new remote shards as its windows hold, and fetches those.

    So while the shards of one window are read, those of the next are fetched, and no more; at most half of the cache is
    filled ahead. Errors are ignored here: they recur, and are reported, when the shard is read.

    Args:
        plan: the order.
        rank, world_size: this process reads rows `rank, rank + world_size, ...` of a step.
        cache: where shards go.
    """

    def __init__(self, plan: Plan | ValidationPlan, *, rank: int, world_size: int, cache: ShardCache):
        self.plan, self.rank, self.world_size, self.cache = plan, rank, world_size, cache
        remote = [has_remote(source.index) for source in plan.sources]
        window = getattr(getattr(plan, "mixture", None), "window_shards", 4)
        self.ahead = window * sum(remote)
        self._remote = [i for i, there in enumerate(remote) if there]
        self._at = self._cursor = 0  # the reader's step; the next step to look at
        self._coming: deque[tuple[int, int]] = deque()  # (step of first use, bytes) of shards ahead of the reader
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()  # (source, shard), most recent last
        self._queue: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=work, args=(self._queue, plan, cache), daemon=True).start()

    def __del__(self) -> None:
        for _ in range(THREADS):
            self._queue.put(None)

    def move_to(self, step: int) -> None:
        """Move the reader to this step, which may lie before the last one (a batch read out of turn)."""
        if step < self._at:
            self._cursor = step
            self._coming.clear()
            self._seen.clear()
        self._at = step
        while self._coming and self._coming[0][0] <= step:
            self._coming.popleft()
        self._cursor = max(self._cursor, step)
        while self._cursor < self.plan.num_steps and len(self._coming) < self.ahead:
            if sum(size for _, size in self._coming) > self.cache.max_bytes // 2:
                return
            for source, shard in self._shards(self._cursor):
                if (source, shard) not in self._seen:
                    size = self.plan.sources[source].index.files[shard].size or 0
                    if self._cursor > step:
                        self._coming.append((self._cursor, size))
                    self._queue.put((source, shard))
                self._seen[source, shard] = None
                self._seen.move_to_end((source, shard))
            while len(self._seen) > 2 * self.ahead:  # forget the oldest: a later pass needs them again
                self._seen.popitem(last=False)
            self._cursor += 1

    def _shards(self, step: int) -> list[tuple[int, int]]:
        """Return the remote shards that hold this rank's rows of a step."""
        rows: dict[int, list[int]] = {source: [] for source in self._remote}
        for planned in self.plan.step(step).rows[self.rank :: self.world_size]:
            for source, row in planned:
                if source in rows:
                    rows[source].append(row)
        found = []
        for source, numbers in rows.items():
            index = self.plan.sources[source].index
            shards = np.unique(np.searchsorted(index.start, numbers, side="right") - 1)
            found += [(source, shard) for shard in shards.tolist() if isinstance(index.files[shard], RemoteShard)]
        return found


def work(wanted: queue.SimpleQueue[tuple[int, int] | None], plan: Plan | ValidationPlan, cache: ShardCache) -> None:
    """Fetch the shards in the queue until None comes."""
    while (pair := wanted.get()) is not None:
        source, shard = pair
        with suppress(OSError, ValueError):
            cache.fetch(plan.sources[source].index.file(shard), wait=False)


def has_remote(index) -> bool:
    """Return whether an index has remote shards."""
    return any(not isinstance(file, str) for file in getattr(index, "files", ()))
