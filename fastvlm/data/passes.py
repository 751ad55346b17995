"""Endless passes over the samples of a source."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count, islice, repeat

import numpy as np

from fastvlm.data.lengths import Measured
from fastvlm.data.source import shuffled

PIECE = 65_536  # costs looked up at a time


def pass_order(source: Measured, *, seed: int, number: int, window_shards: int) -> np.ndarray:
    """Return the rows of pass `number`: shards are shuffled, then samples within windows of `window_shards` shards."""
    shard_of = source.index.shard[source.rows]
    borders = np.searchsorted(shard_of, np.arange(len(source.index.shards) + 1))
    shards = shuffled(len(source.index.shards), seed, source.name, number, "shards")
    windows = []
    for start in range(0, len(shards), window_shards):
        rows = [source.rows[borders[s] : borders[s + 1]] for s in shards[start : start + window_shards]]
        rows = np.concatenate(rows)
        windows.append(rows[shuffled(len(rows), seed, source.name, number, "window", start)])
    return np.concatenate(windows)


class Passes:
    """Endless passes over a source's samples, each in an order of its own.

    Args:
        seed: seed of the order.
        window_shards: samples are shuffled within windows of this many shards.
        times: how often each row was seen before the plan begins (-1: it did not exist); None: the plan begins at the
            start. The first pass omits what the interrupted pass has already seen.
    """

    def __init__(self, source: Measured, *, seed: int, window_shards: int, times: np.ndarray | None = None):
        self.source, self.times = source, times
        self.options = {"seed": seed, "window_shards": window_shards}

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the rows of the index, one pass at a time."""
        numbers, source = count(), self.source
        if self.times is not None:
            times = self.times[source.rows]
            known = times[times >= 0]
            came = self.times > (known.min() if len(known) else 0)  # seen in the interrupted pass
            rows = pass_order(source, number=next(numbers), **self.options)
            yield rows[~came[rows]]
        yield from (pass_order(source, number=number, **self.options) for number in numbers)

    def costs(self, unit: str) -> Iterator[int]:
        """Return an iterator over the samples' costs in `unit`, up to the end of `max_epochs` if the source has one.

        It goes through the passes on its own, so the scheduler (which takes costs) and the planner (which takes rows)
        share no cursor.
        """
        left = None if self.source.num_served is None else max(0, self.source.num_served - self.num_served)
        if unit == "samples":
            return repeat(1) if left is None else repeat(1, left)
        costs = self.source.costs(unit)
        pieces = (rows[i : i + PIECE] for rows in self.rows() for i in range(0, len(rows), PIECE))
        return islice(chain.from_iterable(costs[rows].tolist() for rows in pieces), left)

    @property
    def num_served(self) -> int:
        """Number of samples seen before the plan begins."""
        return 0 if self.times is None else int(self.times[self.times > 0].sum())
