"""Windows of the order: groups of samples that are scheduled and then packed into rows together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

import numpy as np

from fastvlm.data.lengths import Measured
from fastvlm.data.packing import balance, group_by_length, pack_window
from fastvlm.data.passes import Passes
from fastvlm.data.schedule import FairSchedule


@dataclass(frozen=True)
class Window:
    """Samples in order of arrival, and the rows they were packed into."""

    source: np.ndarray  # int16 (samples,): source number
    row: np.ndarray  # int32 (samples,): row of the source's index
    place: np.ndarray  # int32 (samples,): sample numbers in the order in which rows hold them
    size: np.ndarray  # int32 (rows,): number of samples per row
    segments: list[tuple[int, list[Fraction]]]  # `FairSchedule.segments` so far
    is_last: bool  # every source is used up


@dataclass(frozen=True)
class Rows:
    """The limits of a row, and how samples are put into rows.

    Args:
        max_tokens, max_images: maximum number of positions and views per row.
        packing: several samples per row; False: one sample per row.
        group: without packing, put this many samples of similar length together; None: keep the order of arrival.
    """

    max_tokens: int
    max_images: int
    packing: bool
    group: int | None = None

    def fill(
        self, lengths: np.ndarray, images: np.ndarray, costs: np.ndarray, sources: np.ndarray, num_sources: int
    ) -> list[list[int]]:
        """Return the samples in row order, as one list of sample numbers per row or group.

        Packed rows and groups are ordered so that no source bunches up.

        Args:
            lengths, images, costs, sources: (n,) of the samples of a window.
        """
        if self.packing:
            budget = {"max_tokens": self.max_tokens, "max_images": self.max_images}
            packs = pack_window(lengths.tolist(), images.tolist(), **budget)
        elif self.group is not None:
            packs = group_by_length(lengths.tolist(), group=self.group)
        else:
            return [[i] for i in range(len(sources))]
        served = np.bincount(sources, weights=costs, minlength=num_sources).astype(np.int64).tolist()
        shares = [Fraction(cost, max(1, sum(served))) for cost in served]
        return balance(packs, sources=sources, costs=costs, weights=shares)


class WindowPlanner:
    """Plans one window after another.

    Args:
        sources: in the mixture's order.
        weights: shares of the sources.
        unit: what the shares are counted in.
        passes: one per source.
        rows: limits and layout of rows.
        window: number of samples per window.
        epoch: end a window after every so many samples, too; None: do not.
        served: samples of the epochs that came before the first window.
    """

    def __init__(
        self,
        sources: Sequence[Measured],
        *,
        weights: Sequence[Fraction],
        unit: str,
        passes: Sequence[Passes],
        rows: Rows,
        window: int,
        epoch: int | None = None,
        served: int = 0,
    ):
        self.sources, self.unit, self.rows, self.window = sources, unit, rows, window
        self.epoch, self.served, self._num_planned = epoch, served, 0
        self._passes = [p.rows() for p in passes]
        self._queues = [np.empty(0, dtype=np.int64) for _ in sources]  # rows of the current passes, not planned yet
        self._schedule = FairSchedule(weights, [p.costs(unit) for p in passes])

    def _next_size(self) -> int:
        """Return the number of samples of the next window."""
        if self.epoch is None:
            return self.window
        size = min(self.window, self.epoch - (self.served + self._num_planned) % self.epoch)
        # Two epochs share a group: its parts are windows of their own, or all groups that follow would be displaced.
        group = self.rows.group or 1
        begun = self._num_planned % group
        return min(size, group - begun) if begun else size - size % group or size

    def next_window(self) -> Window:
        """Schedule and pack the next window."""
        size = self._next_size()
        sources = self._schedule.take(size)
        self._num_planned += len(sources)
        rows = np.empty(len(sources), dtype=np.int32)
        lengths, images, costs = np.empty_like(rows), np.empty_like(rows), np.empty_like(rows)
        for i, source in enumerate(self.sources):
            here = np.flatnonzero(sources == i)
            while len(self._queues[i]) < len(here):
                self._queues[i] = np.concatenate([self._queues[i], next(self._passes[i])])
            rows[here], self._queues[i] = self._queues[i][: len(here)], self._queues[i][len(here) :]
            lengths[here], images[here] = source.length[rows[here]], source.images[rows[here]]
            costs[here] = source.costs(self.unit)[rows[here]]
        packs = self.rows.fill(lengths, images, costs, sources, len(self.sources))
        place = np.fromiter(chain.from_iterable(packs), dtype=np.int32, count=len(sources))
        sizes = np.array([len(p) for p in packs] if self.rows.packing else [1] * len(sources), dtype=np.int32)
        return Window(sources, rows, place, sizes, self._schedule.segments, len(sources) < size)
