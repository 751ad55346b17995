"""The plan: the order of all samples, as a pure function of the indexes, the mixture and the seed.

Every source yields an endless sequence of samples (`passes.py`). The sources are interleaved so that shares are exact
at every prefix (`schedule.py`), packed window by window into rows (`windows.py`, `packing.py`), stored (`order.py`) and
cut into optimiser steps of `batch_size` rows. Step i is the same for any number of ranks, workers or restarts; ranks
and accumulated micro-batches take slices of its rows. Shards are read only where the index does not suffice, as for
samples that must be truncated (`lengths.py`). `plan_report.py` reports what a plan will do.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from fastvlm.data.lengths import measure_source
from fastvlm.data.order import Order
from fastvlm.data.packing import window_of
from fastvlm.data.passes import Passes
from fastvlm.data.replan import Seen
from fastvlm.data.source import UNITS, Mixture
from fastvlm.data.transforms import ImageTransform
from fastvlm.data.windows import Rows, WindowPlanner
from fastvlm.tokens import Tokenizer

KEEP_AFTER = 2.0  # seconds; an order that took longer to plan is cached
PIECE = 1 << 14  # samples or rows looked up at a time
VERSION = 2  # of the algorithms; increase it when the same data would be ordered differently


@dataclass
class Step:
    """One optimiser step: its rows, each a list of samples as (source number, row of the source's index)."""

    rows: list[list[tuple[int, int]]]
    num_answer_tokens: int  # learned tokens of the whole step, over all ranks and micro-batches
    num_images: int  # views, likewise


class Plan:
    """Assigns samples to the rows of all optimiser steps.

    An epoch is as many samples as all sources hold together (each counted `repeat` times). Sources go through passes of
    their own at the pace set by their weights, and a pass continues beyond the end of an epoch, so every sample of a
    source is scheduled once before any is scheduled again. Packing and sorting rearrange the samples within a window,
    also over the end of a pass. If `epochs` set the length, no window reaches beyond the end of an epoch: of a single
    source, or a mixture without weights, every epoch holds each sample once (`repeat` times).

    Args:
        mixture: sources, weights and unit.
        tokenizer: counts the lengths.
        split: train, val or test.
        tokens_per_image: slots per view of an image.
        batch_size: rows per optimiser step, over all ranks and micro-batches.
        max_tokens: maximum length of a row; longer samples are truncated at the end.
        max_images: maximum number of views per row; an image without tiles is one view.
        packing: put several samples into a row; False: one sample per row.
        pack_window: number of samples that are packed together; None: as `window_of` chooses.
        sort_window: without packing, group samples of similar length within windows of this many samples; 0: do not.
        seed: seed of the order.
        num_steps: length of the stage; None: use `epochs`.
        epochs: length of the stage if `num_steps` is None; None: one epoch. The last step is filled with the samples
            that follow.
        after: what an interrupted stage has seen of data that changed since (`replan.py`). The plan begins with its
            next step, and the first pass over a source omits what the interrupted pass has already seen.
        transform: determines the number of views of an image; None: one view.
        cache: folder in which orders that took seconds to plan are cached by fingerprint; None: no cache.
        where: prefix of the keys in error messages, such as `stages.align.`.

    Raises:
        ValueError: a source without usable samples, or a parameter out of range.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        *,
        split: str = "train",
        tokens_per_image: int,
        batch_size: int,
        max_tokens: int,
        max_images: int = 8,
        packing: bool = True,
        pack_window: int | None = None,
        sort_window: int = 0,
        seed: int = 0,
        num_steps: int | None = None,
        epochs: float | int | None = None,
        after: Seen | None = None,
        transform: ImageTransform | None = None,
        cache: str | Path | None = None,
        where: str = "",
    ):
        limits = {"batch_size": batch_size, "max_tokens": max_tokens, "pack_window": pack_window, "steps": num_steps}
        check_limits(where, **limits, max_images=max_images)
        if sort_window < 0:
            raise ValueError(f"{where}sort_window={sort_window} must be 0 or more")
        if epochs is not None and not (num_steps is None and epochs > 0):
            raise ValueError(f"{where}epochs={epochs} must be above 0 and stand without steps (here {num_steps})")
        self.mixture, self.unit, self.seed, self.where = mixture, mixture.unit, seed, where
        self.tokens_per_image, self.max_tokens, self.max_images = tokens_per_image, max_tokens, max_images
        self.batch_size, self.packing = batch_size, packing
        fits = {"tokens_per_image": tokens_per_image, "max_tokens": max_tokens, "max_images": max_images}
        fits |= {"transform": transform, "where": where}
        self.tiles = [transform.image_size, transform.tiles] if transform is not None and transform.tiles else None
        self.sources = [
            measure_source(s, tokenizer, name=name, split=split, **fits) for name, s in mixture.sources.items()
        ]
        self.names = mixture.names
        held = [int(s.costs(self.unit)[s.rows].sum()) * s.repeat for s in self.sources]
        self.weights = mixture.shares or [h / sum(held) for h in held]
        self.epoch_samples = max(1, sum(int(len(s.rows) * s.repeat) for s in self.sources))
        self._window = self._window_size(pack_window, sort_window)
        # A group is one step, so that no group of similar lengths straddles two steps.
        self._group = batch_size if sort_window > 0 and not packing else None
        self._cut = self.epoch_samples if num_steps is None else None  # no window reaches beyond so many samples
        self.base = self.fingerprint = self._hash(split, tokenizer, pack_window, sort_window)
        self.after = after
        if after is not None:
            self.fingerprint = hashlib.sha256(f"{self.base} after {after.digest}".encode()).hexdigest()[:16]
        self._passes = [
            Passes(
                source,
                seed=seed,
                window_shards=mixture.window_shards,
                times=None if after is None else after.times(source.name, source.index),
            )
            for source in self.sources
        ]
        self._cache = None if cache is None else Path(cache) / self.fingerprint
        self._seconds = 0.0  # spent on planning windows
        self.order = (None if self._cache is None else Order.load(self._cache)) or Order()
        self._planner: WindowPlanner | None = None
        self.num_steps = self._count_steps(epochs) if num_steps is None else num_steps
        if all(s.max_epochs is not None for s in self.sources):
            self.extend()

    def _window_size(self, pack_window: int | None, sort_window: int) -> int:
        """Return the number of samples that are planned together."""
        if not self.packing:
            return -(-(sort_window or 1024) // self.batch_size) * self.batch_size
        if pack_window:
            return pack_window
        return window_of(*self._average(), max_tokens=self.max_tokens, max_images=self.max_images)

    def _average(self) -> tuple[float, float]:
        """Return the average tokens and views per sample of the mixture."""
        sizes = [
            (s.length[s.rows].mean(), s.images[s.rows].mean(), s.costs(self.unit)[s.rows].mean()) for s in self.sources
        ]
        often = [float(w) / max(cost, 1e-9) for w, (_, _, cost) in zip(self.weights, sizes)]
        return tuple(sum(n * size[k] for n, size in zip(often, sizes)) / sum(often) for k in (0, 1))

    def _hash(self, split: str, tokenizer: Tokenizer, pack_window: int | None, sort_window: int) -> str:
        """Hash everything the order depends on.

        The number of steps is not included: a longer plan begins like a shorter one.
        """
        state = {
            "version": VERSION,
            "sources": {
                s.name: [
                    s.index.checksum,
                    hashlib.sha256(s.rows.tobytes()).hexdigest(),
                    s.source.images,
                    s.source.system,
                    str(s.repeat),
                    str(s.max_epochs),
                ]
                for s in self.sources
            },
            "weights": [str(w) for w in self.weights],
            "names": self.names,
            "unit": self.unit,
            "window_shards": self.mixture.window_shards,
            "split": split,
            "tokenizer": tokenizer.fingerprint,
            "budget": [self.tokens_per_image, self.batch_size, self.max_tokens, self.max_images],
            "packing": [self.packing, pack_window, sort_window],
            **({"tiles": self.tiles} if self.tiles else {}),
            **({"cut": self._cut} if self._cut else {}),
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]

    def _count_steps(self, epochs: float | int | None) -> int:
        """Return the step at which `epochs` (None: one) end, counting steps and samples from before the plan begins."""
        wanted = max(1, round(self.epoch_samples * (1 if epochs is None else epochs)) - self._num_served)
        while (self.order.num_samples < wanted or not self._num_planned) and not self.order.used_up:
            self._plan_window()
        while self.order.columns.end[self._num_planned * self.batch_size] < wanted and not self.order.used_up:
            self._plan_window()
        ends = self.order.columns.end[self.batch_size :: self.batch_size]
        return min(int(np.searchsorted(ends, wanted)) + 1, len(ends))

    def _plan_window(self) -> None:
        """Schedule and pack one more window; if a cached order is too short, start over at the first window."""
        begun = time.process_time()
        if self._planner is None:
            rows = Rows(self.max_tokens, self.max_images, packing=self.packing, group=self._group)
            share = {"weights": self.weights, "unit": self.unit}
            size = {"window": self._window, "epoch": self._cut, "served": self._num_served}
            self._planner = WindowPlanner(self.sources, **share, passes=self._passes, rows=rows, **size)
            self.order = Order(num_empty=0 if self.after is None else self.after.step * self.batch_size)
        self.order.append(self._planner.next_window(), batch_size=self.batch_size)
        self._seconds += time.process_time() - begun

    @property
    def _num_served(self) -> int:
        """Number of samples seen before the plan begins."""
        return sum(p.num_served for p in self._passes)

    @property
    def _num_planned(self) -> int:
        """Number of complete steps planned so far."""
        return self.order.num_rows // self.batch_size

    def extend(self, num_steps: int | None = None) -> None:
        """Plan the first `num_steps` steps now (None: all steps), so that forked workers share the result.

        Raises:
            ValueError: every source has `max_epochs`, and all are used up before that.
        """
        while self._num_planned < (num_steps or self.num_steps):
            if self.order.used_up:
                raise ValueError(
                    f"{self.where}steps={self.num_steps}: every source has max_epochs, and together they last "
                    f"{self._num_planned} steps; ask for fewer steps, or raise a source's max_epochs"
                )
            self._plan_window()
        if num_steps is None and self._cache is not None and self._seconds > KEEP_AFTER:
            self._seconds = 0.0
            self.order.save(self._cache)

    def __getstate__(self) -> dict:
        """Return the state for spawned loader processes: the finished order, without the planner."""
        self.extend()
        self.order.join()
        return self.__dict__ | {"_planner": None, "_cache": None}

    def step(self, i: int) -> Step:
        """Return optimiser step i, planning as far as needed.

        Raises:
            IndexError: i is not a step of the plan.
        """
        if not 0 <= i < self.num_steps:
            raise IndexError(f"step {i} of a plan of {self.num_steps} steps")
        self.extend(i + 1)
        order = self.order.columns
        first = i * self.batch_size
        ends = order.end[first : first + self.batch_size + 1].tolist()
        place = order.place[ends[0] : ends[-1]]
        sources, rows = order.source[place], order.row[place]
        own = [rows[sources == k] for k in range(len(self.sources))]
        answers = sum(int(s.answer[mine].sum()) for s, mine in zip(self.sources, own))
        images = sum(int(s.images[mine].sum()) for s, mine in zip(self.sources, own))
        pairs = list(zip(sources.tolist(), rows.tolist()))
        return Step([pairs[a - ends[0] : b - ends[0]] for a, b in zip(ends, ends[1:])], answers, images)

    def position(self, step: int) -> tuple[int, int]:
        """Return (epoch, step in the epoch) of a step's first sample.

        Also works for the step after the last one, without planning it.
        """
        self.extend(max(step, 1))
        starts = self.order.columns.end[: step * self.batch_size + 1 : self.batch_size]
        epoch = int(starts[step]) // self.epoch_samples
        return epoch, step - int(np.searchsorted(starts, epoch * self.epoch_samples))

    @property
    def num_images(self) -> int:
        """Number of views in the planned samples of all sources; 0 if there are no images."""
        return sum(int(s.images[s.rows].sum()) for s in self.sources)

    @property
    def num_samples(self) -> int:
        """Number of samples in all steps."""
        self.extend()
        return int(self.order.columns.end[self.num_steps * self.batch_size])

    def segments(self) -> list[tuple[int, list[Fraction]]]:
        """Return (first sample, weights) of each segment of the planned steps, in order.

        The weights change where `max_epochs` ends a source.
        """
        planned = self.num_samples
        return [(first, weights) for first, weights in self.order.segments if first < planned]

    def arrivals(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return source numbers (int16) and index rows (int32) of the first n samples, in scheduled order."""
        while self.order.num_samples < n and not self.order.used_up:
            self._plan_window()
        return self.order.columns.source[:n], self.order.columns.row[:n]

    def first_samples(self, n: int) -> list[tuple[int, int]]:
        """Return (source number, index row) of the first n samples, in scheduled order."""
        return list(zip(*(column.tolist() for column in self.arrivals(n))))

    def costs(self, n: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
        """Return source numbers and costs in `unit` (int64) of the first n samples, in scheduled order.

        Raises:
            ValueError: unknown unit.
        """
        pieces = list(self.pieces(n, unit))
        return tuple(np.concatenate(column) for column in zip(*pieces)) if pieces else (np.empty(0, np.int16),) * 2

    def pieces(
        self, n: int, unit: str, *, start: int = 0, in_rows: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `costs` of samples `start .. n` in pieces, so that reducing over all samples needs little memory.

        Args:
            in_rows: in the order in which rows hold the samples; False: in scheduled order.

        Raises:
            ValueError: unknown unit.
        """
        if unit not in UNITS:
            raise ValueError(f"unit={unit} is not one of {', '.join(UNITS)}")
        n = len(self.arrivals(n)[0])
        costs, columns = Joined([source.costs(unit) for source in self.sources]), self.order.columns
        for first in range(start, n, PIECE):
            at = slice(first, min(first + PIECE, n))
            at = columns.place[at] if in_rows else at
            yield columns.source[at], costs.at(columns.source[at], columns.row[at])

    def row_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of positions and views of every row: two int64 (steps, rows per step)."""
        self.extend()
        order, rows = self.order.columns, self.num_steps * self.batch_size
        tokens, images = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)
        sizes = [(tokens, Joined([s.length for s in self.sources])), (images, Joined([s.images for s in self.sources]))]
        for first in range(0, rows, PIECE):
            end = order.end[first : min(first + PIECE, rows) + 1]
            place = order.place[end[0] : end[-1]]
            sources, rows_of = order.source[place], order.row[place]
            for out, column in sizes:
                total = np.concatenate([[0], column.at(sources, rows_of).cumsum()])
                out[first : first + PIECE] = np.diff(total[end - end[0]])
        return tuple(column.reshape(self.num_steps, -1) for column in (tokens, images))


class Joined:
    """One column of all sources, looked up by source number and row."""

    def __init__(self, columns: Sequence[np.ndarray]):
        self.values, self.starts = np.concatenate(columns), np.cumsum([0, *map(len, columns)])

    def at(self, sources: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the values at pairs of source number and index row, as int64."""
        return self.values[self.starts[sources] + rows].astype(np.int64)


def check_limits(where: str, **numbers: int | None) -> None:
    """Check that all limits are at least 1.

    Raises:
        ValueError: one is below 1; the message names its key.
    """
    for key, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{where}{key}={value} must be 1 or more")
