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
    ):
        self.sources, self.unit, self.rows, self.window = sources, unit, rows, window
        self._passes = [p.rows() for p in passes]
        self._queues = [np.empty(0, dtype=np.int64) for _ in sources]  # rows of the current passes, not planned yet
        self._schedule = FairSchedule(weights, [p.costs(unit) for p in passes])

    def next_window(self) -> Window:
        """Schedule and pack the next window."""
        sources = self._schedule.take(self.window)
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
        return Window(sources, rows, place, sizes, self._schedule.segments, len(sources) < self.window)
