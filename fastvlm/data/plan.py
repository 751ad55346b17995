"""The plan: the order of all samples, as a pure function of the indexes, the mixture and the seed. No shard is read.

An endless sequence of samples (`passes.py`) is scheduled over the sources (`schedule.py`: shares are exact at every
prefix), packed window by window into rows (`windows.py`, `packing.py`), kept (`order.py`) and cut into optimiser steps
of `batch_size` rows. Step i is the same for any number of ranks, workers or restarts; ranks and accumulated
micro-batches take slices of its rows. What a plan will do, in numbers and words: `plan_report.py`.
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

KEEP_AFTER = 2.0  # seconds of planning that are worth a place in the cache
PIECE = 1 << 14  # samples, or rows, that are looked up at a time
VERSION = 2  # of the order: another number, another order for the same data


@dataclass
class Step:
    """One optimiser step: rows of (source number, row of its index)."""

    rows: list[list[tuple[int, int]]]
    num_answer_tokens: int  # learned tokens of the whole step, over all ranks and micro-batches


class Plan:
    """Which samples are in which row of which optimiser step.

    An epoch is as many samples as all sources hold together (each times its `repeat`); sources go through passes of
    their own at the pace of their weights, and a pass goes on over the end of an epoch, so that every sample of a
    source is seen once before any is seen again.

    Args:
        mixture: sources, weights, unit.
        tokenizer: under which lengths are counted.
        split: train, val or test.
        tokens_per_image: slots a view of an image takes.
        batch_size: rows of an optimiser step, over all ranks and micro-batches.
        max_tokens: longest row; longer samples are truncated at their end.
        max_images: most views of a row; an image without tiles is one.
        packing: several samples a row; else a row is one sample.
        pack_window: samples that are packed together; None: as many as `window_of` says.
        sort_window: without packing, group samples of like length within windows of this many samples; 0 for not.
        seed: of the order.
        num_steps: length of the stage; None for `epochs`.
        epochs: length of the stage when `num_steps` is None; the last step is filled from what follows.
        after: what an interrupted stage had seen of other data (`replan.py`): the plan begins with that step, and the
            first pass over a source leaves out what came in the pass before.
        transform: says how many views an image of the index has; None: one.
        cache: a folder for orders that took seconds to make; a plan of the same fingerprint finds them there.
        where: what stands before the keys in messages, such as `stages.align.`.

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
        check_limits(where, **limits)
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
        # Without packing, whole steps: else a group of like length would straddle two of them.
        self._group = batch_size if sort_window > 0 and not packing else None
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
        """Samples that are planned together."""
        if not self.packing:
            return -(-(sort_window or 1024) // self.batch_size) * self.batch_size
        if pack_window:
            return pack_window
        return window_of(*self._average(), max_tokens=self.max_tokens, max_images=self.max_images)

    def _average(self) -> tuple[float, float]:
        """Tokens and views of a sample of the mixture, on average."""
        sizes = [
            (s.length[s.rows].mean(), s.images[s.rows].mean(), s.costs(self.unit)[s.rows].mean()) for s in self.sources
        ]
        often = [float(w) / max(cost, 1e-9) for w, (_, _, cost) in zip(self.weights, sizes)]
        return tuple(sum(n * size[k] for n, size in zip(often, sizes)) / sum(often) for k in (0, 1))

    def _hash(self, split: str, tokenizer: Tokenizer, pack_window: int | None, sort_window: int) -> str:
        """Everything the order depends on. The number of steps is not in it: a longer plan begins as a shorter one."""
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
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]

    def _count_steps(self, epochs: float | int | None) -> int:
        """Steps of so many epochs, less what came before the plan begins."""
        served = sum(p.num_served for p in self._passes)
        wanted = max(1, round(self.epoch_samples * (1 if epochs is None else epochs)) - served)
        while (self.order.num_samples < wanted or not self._num_planned) and not self.order.used_up:
            self._plan_window()
        while self.order.columns.end[self._num_planned * self.batch_size] < wanted and not self.order.used_up:
            self._plan_window()
        ends = self.order.columns.end[self.batch_size :: self.batch_size]
        return min(int(np.searchsorted(ends, wanted)) + 1, len(ends))

    def _plan_window(self) -> None:
        """Schedule and pack one more window; from the first, where an order that was kept is too short."""
        begun = time.process_time()
        if self._planner is None:
            rows = Rows(self.max_tokens, self.max_images, packing=self.packing, group=self._group)
            share = {"weights": self.weights, "unit": self.unit}
            self._planner = WindowPlanner(self.sources, **share, passes=self._passes, rows=rows, window=self._window)
            self.order = Order(num_empty=0 if self.after is None else self.after.step * self.batch_size)
        self.order.append(self._planner.next_window(), batch_size=self.batch_size)
        self._seconds += time.process_time() - begun

    @property
    def _num_planned(self) -> int:
        """Whole steps planned so far."""
        return self.order.num_rows // self.batch_size

    def extend(self, num_steps: int | None = None) -> None:
        """Plan up to this many steps now (all of them unless told), so that forked workers share the result.

        Raises:
            ValueError: every source has `max_epochs`, and they are used up before.
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
        """For loader processes that are spawned and not forked: the finished order, without what makes more of it."""
        self.extend()
        self.order.join()
        return self.__dict__ | {"_planner": None, "_cache": None}

    def step(self, i: int) -> Step:
        """Optimiser step i, planning as far as needed.

        Raises:
            IndexError: beyond the end of the plan.
        """
        if not 0 <= i < self.num_steps:
            raise IndexError(f"step {i} of a plan of {self.num_steps} steps")
        self.extend(i + 1)
        order = self.order.columns
        first = i * self.batch_size
        ends = order.end[first : first + self.batch_size + 1].tolist()
        place = order.place[ends[0] : ends[-1]]
        sources, rows = order.source[place], order.row[place]
        answers = sum(int(s.answer[rows[sources == k]].sum()) for k, s in enumerate(self.sources))
        pairs = list(zip(sources.tolist(), rows.tolist()))
        return Step([pairs[a - ends[0] : b - ends[0]] for a, b in zip(ends, ends[1:])], answers)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch): the epoch to which the step's first sample belongs. Also of the step after the
        last one, without planning it."""
        self.extend(max(step, 1))
        starts = self.order.columns.end[: step * self.batch_size + 1 : self.batch_size]
        epoch = int(starts[step]) // self.epoch_samples
        return epoch, step - int(np.searchsorted(starts, epoch * self.epoch_samples))

    @property
    def num_images(self) -> int:
        """Views of all planned sources together; 0 when there is nothing to look at."""
        return sum(int(s.images[s.rows].sum()) for s in self.sources)

    @property
    def num_samples(self) -> int:
        """Samples of all steps."""
        self.extend()
        return int(self.order.columns.end[self.num_steps * self.batch_size])

    def segments(self) -> list[tuple[int, list[Fraction]]]:
        """(first sample, weights) of each stretch of the planned steps, in order of arrival: the weights change where
        `max_epochs` ends a source."""
        planned = self.num_samples
        return [(first, weights) for first, weights in self.order.segments if first < planned]

    def arrivals(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Source number (int16) and row of its index (int32) of the first n samples, as scheduled."""
        while self.order.num_samples < n and not self.order.used_up:
            self._plan_window()
        return self.order.columns.source[:n], self.order.columns.row[:n]

    def first_samples(self, n: int) -> list[tuple[int, int]]:
        """(source number, row of its index) of the first n samples, as scheduled."""
        return list(zip(*(column.tolist() for column in self.arrivals(n))))

    def costs(self, n: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
        """Source number and cost in the unit (int64) of the first n samples, as scheduled.

        Raises:
            ValueError: no such unit.
        """
        pieces = list(self.pieces(n, unit))
        return tuple(np.concatenate(column) for column in zip(*pieces)) if pieces else (np.empty(0, np.int16),) * 2

    def pieces(
        self, n: int, unit: str, *, start: int = 0, in_rows: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`costs` of samples `start .. n`, some at a time: what is computed over all of them needs little memory.

        Args:
            in_rows: in the order in which rows hold the samples, else as scheduled.

        Raises:
            ValueError: no such unit.
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
        """Positions and images of every row: two int64 (steps, rows of a step)."""
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
    """A column of every source, to be looked up by source number and row."""

    def __init__(self, columns: Sequence[np.ndarray]):
        self.values, self.starts = np.concatenate(columns), np.cumsum([0, *map(len, columns)])

    def at(self, sources: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """int64, as many as there are pairs of a source's number and a row of its index."""
        return self.values[self.starts[sources] + rows].astype(np.int64)


def check_limits(where: str, **numbers: int | None) -> None:
    """Raises:
    ValueError: one of them is below 1, with its key.
    """
    for key, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{where}{key}={value} must be 1 or more")
