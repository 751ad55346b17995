"""The plan: the order of everything, as a pure function of the indexes, the mixture and the seed. No data is read.

An endless sequence of samples is scheduled over the sources (`schedule.py`: shares are exact at every prefix), packed
window by window into rows (`packing.py`), and cut into optimiser steps of `batch_size` rows. Step i is the same for any
number of ranks, workers or restarts; ranks and accumulated micro-batches take slices of its rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count, islice, repeat
from pathlib import Path

import numpy as np

from fastvlm.data.lengths import Measured, measure_source
from fastvlm.data.packing import balance, group_by_length, pack_window, window_of
from fastvlm.data.replan import Seen
from fastvlm.data.schedule import FairSchedule, prefix_error
from fastvlm.data.source import UNITS, Mixture, shuffled
from fastvlm.data.transforms import ImageTransform
from fastvlm.tokens import Tokenizer

KEEP_AFTER = 2.0  # seconds of planning that are worth a place in the cache
VERSION = 2  # of the order: another number, another order for the same data


@dataclass
class Step:
    """One optimiser step: rows of (source number, row of its index)."""

    rows: list[list[tuple[int, int]]]
    num_answer_tokens: int  # learned tokens of the whole step, over all ranks and micro-batches


def pass_order(source: Measured, *, seed: int, number: int, window_shards: int) -> np.ndarray:
    """Rows of pass `number` over a source: shards shuffled, then samples within windows of `window_shards` shards."""
    shard_of = source.index.shard[source.rows]
    borders = np.searchsorted(shard_of, np.arange(len(source.index.shards) + 1))
    shards = shuffled(len(source.index.shards), seed, source.name, number, "shards")
    windows = []
    for start in range(0, len(shards), window_shards):
        rows = [source.rows[borders[s] : borders[s + 1]] for s in shards[start : start + window_shards]]
        rows = np.concatenate(rows)
        windows.append(rows[shuffled(len(rows), seed, source.name, number, "window", start)])
    return np.concatenate(windows)


class Plan:
    """Which samples stand in which row of which optimiser step.

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
    ):
        limits = {
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "pack_window": pack_window,
            "num_steps": num_steps,
        }
        for key, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value} must be 1 or more")
        if epochs is not None and not (num_steps is None and epochs > 0):
            raise ValueError(f"data.epochs={epochs} must be above 0 and stand without num_steps (here {num_steps})")
        self.mixture, self.unit, self.seed = mixture, mixture.unit, seed
        self.tokens_per_image, self.max_tokens, self.max_images = tokens_per_image, max_tokens, max_images
        self.batch_size, self.packing = batch_size, packing
        # Without packing, whole steps: else a group of like length would straddle two of them.
        self._sorted = not packing and sort_window > 0
        fits = {"tokens_per_image": tokens_per_image, "max_tokens": max_tokens, "max_images": max_images}
        fits["transform"] = transform
        self.tiles = [transform.image_size, transform.tiles] if transform is not None and transform.tiles else None
        self.sources = [
            measure_source(s, tokenizer, name=name, split=split, **fits) for name, s in mixture.sources.items()
        ]
        self.names = mixture.names
        held = [int(s.costs(self.unit)[s.rows].sum()) * s.repeat for s in self.sources]
        self.weights = mixture.shares or [h / sum(held) for h in held]
        if packing:
            self._window = pack_window or window_of(*self._average(), max_tokens=max_tokens, max_images=max_images)
        else:
            self._window = -(-(sort_window or 1024) // batch_size) * batch_size
        self.epoch_samples = sum(int(len(s.rows) * s.repeat) for s in self.sources)
        self.base = self.fingerprint = self._hash(split, tokenizer, pack_window, sort_window)
        self.after, self._times = after, None
        if after is not None:
            self.fingerprint = hashlib.sha256(f"{self.base} after {after.digest}".encode()).hexdigest()[:16]
            self._times = [after.times(s.name, s.index) for s in self.sources]

        self._cache = None if cache is None else Path(cache) / self.fingerprint
        self._seconds = 0.0  # spent on planning windows
        # The order so far, in pieces of one window each; `_order` makes one piece of them.
        self._source: list[np.ndarray] = []  # int16, in order of arrival (as scheduled)
        self._row: list[np.ndarray] = []  # int32, likewise
        self._place: list[np.ndarray] = []  # int32: arrival numbers in the order in which rows hold them
        self._size: list[np.ndarray] = []  # int32: samples of each row
        self._num_samples, self._num_rows = 0, 0
        self._joined: _Order | None = None
        self._schedule: FairSchedule | None = None
        self._segments: list[tuple[int, list[Fraction]]] = []  # (first sample, weights of the sources not used up)
        self._used_up = False  # every source is: there is no further sample
        self._restore()
        if num_steps is None:
            wanted = max(1, round(self.epoch_samples * (1 if epochs is None else epochs)) - self._num_served())
            while (self._num_samples < wanted or not self._num_steps) and not self._used_up:
                self._plan_window()
            while self._order().end[self._num_steps * batch_size] < wanted and not self._used_up:
                self._plan_window()
            ends = self._order().end[batch_size::batch_size]
            num_steps = min(int(np.searchsorted(ends, wanted)) + 1, len(ends))
        self.num_steps = num_steps
        if all(s.max_epochs is not None for s in self.sources):
            self.extend()

    def _begin(self) -> None:
        """From the first window; what `_restore` found was too short."""
        for pieces in (self._source, self._row, self._place, self._size):
            pieces.clear()
        self._num_samples, self._num_rows, self._joined, self._used_up = 0, 0, None, False
        if self.after is not None:  # steps that are over stand as empty rows
            self._num_rows = self.after.step * self.batch_size
            self._size.append(np.zeros(self._num_rows, dtype=np.int32))
        self._passes = [self._iterate_passes(s) for s in self.sources]
        self._queues: list[np.ndarray] = [np.empty(0, dtype=np.int64) for _ in self.sources]  # rows not yet planned
        self._schedule = FairSchedule(self.weights, [self._iterate_costs(s) for s in self.sources])

    def _restore(self) -> None:
        """Take an order that was kept, memory-mapped; a broken one is planned again."""
        if self._cache is None or not self._cache.is_dir():
            return
        try:
            kept = [np.load(self._cache / f"{name}.npy", mmap_mode="r") for name in ("source", "row", "place", "size")]
            state = json.loads((self._cache / "segments.json").read_text())
        except (OSError, ValueError):
            return
        if len(kept[0]) == len(kept[1]) == len(kept[2]) == int(kept[3].sum(dtype=np.int64)):
            self._segments = [(first, [Fraction(w) for w in weights]) for first, weights in state["segments"]]
            self._used_up = state["used_up"]
            self._source, self._row, self._place, self._size = ([column] for column in kept)
            self._num_samples, self._num_rows = len(kept[0]), len(kept[3])

    def _keep(self) -> None:
        """Write the order so that the next start needs no planning; folders appear whole, by rename."""
        order, beside = self._order(), self._cache.with_name(f".{self._cache.name}.{os.getpid()}")
        try:
            beside.mkdir(parents=True, exist_ok=True)
            for name, column in (("source", order.source), ("row", order.row), ("place", order.place)):
                np.save(beside / f"{name}.npy", column)
            np.save(beside / "size.npy", self._size[0])
            segments = [[first, [str(w) for w in weights]] for first, weights in self._segments]
            (beside / "segments.json").write_text(json.dumps({"segments": segments, "used_up": self._used_up}))
            shutil.rmtree(self._cache, ignore_errors=True)
            os.rename(beside, self._cache)
        except OSError:  # a full disk, or another run that was first: the order is in memory all the same
            shutil.rmtree(beside, ignore_errors=True)

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

    def _num_served(self, source: Measured | None = None) -> int:
        """Samples that came before the plan begins, of one source or of all."""
        if self._times is None:
            return 0
        chosen = [t for s, t in zip(self.sources, self._times) if source is None or s is source]
        return int(sum(t[t > 0].sum() for t in chosen))

    def _iterate_passes(self, source: Measured):
        options = {"seed": self.seed, "window_shards": self.mixture.window_shards}
        first = count()
        if self._times is not None:
            times = self._times[self.sources.index(source)]
            known = times[source.rows][times[source.rows] >= 0]
            came = times > (known.min() if len(known) else 0)  # in the pass that was interrupted
            rows = pass_order(source, number=next(first), **options)
            yield rows[~came[rows]]
        yield from (pass_order(source, number=p, **options) for p in first)

    def _iterate_costs(self, source: Measured):
        """Costs in the order of the passes: the same passes again, so that schedule and rows need no shared cursor."""
        left = None if source.num_served is None else max(0, source.num_served - self._num_served(source))
        if self.unit == "samples":
            return repeat(1) if left is None else repeat(1, left)
        costs = source.costs(self.unit)
        pieces = (rows[i : i + 65_536] for rows in self._iterate_passes(source) for i in range(0, len(rows), 65_536))
        return islice(chain.from_iterable(costs[rows].tolist() for rows in pieces), left)

    def _plan_window(self) -> None:
        """Schedule and pack one more window."""
        begun = time.process_time()
        if self._schedule is None:
            self._begin()
        sources = self._schedule.take(self._window)
        self._segments, self._used_up = self._schedule.segments, len(sources) < self._window
        rows = np.empty(len(sources), dtype=np.int32)
        lengths, images, costs = np.empty_like(rows), np.empty_like(rows), np.empty_like(rows)
        for i, source in enumerate(self.sources):
            here = np.flatnonzero(sources == i)
            while len(self._queues[i]) < len(here):
                self._queues[i] = np.concatenate([self._queues[i], next(self._passes[i])])
            rows[here], self._queues[i] = self._queues[i][: len(here)], self._queues[i][len(here) :]
            lengths[here], images[here] = source.length[rows[here]], source.images[rows[here]]
            costs[here] = source.costs(self.unit)[rows[here]]
        if self.packing:
            budget = {"max_tokens": self.max_tokens, "max_images": self.max_images}
            packs = pack_window(lengths.tolist(), images.tolist(), **budget)
        elif self._sorted:
            packs = group_by_length(lengths.tolist(), group=self.batch_size)
        else:
            packs = [[i] for i in range(len(sources))]
        if self.packing or self._sorted:
            served = np.bincount(sources, weights=costs, minlength=len(self.sources)).astype(np.int64).tolist()
            shares = [Fraction(cost, max(1, sum(served))) for cost in served]
            packs = balance(packs, sources=sources, costs=costs, weights=shares)
        place = np.fromiter(chain.from_iterable(packs), dtype=np.int32, count=len(sources))
        sizes = np.array([len(p) for p in packs] if self.packing else [1] * len(sources), dtype=np.int32)
        if self._used_up:  # the last step is filled with empty rows
            sizes = np.pad(sizes, (0, -(self._num_rows + len(sizes)) % self.batch_size))
        self._source.append(sources)
        self._row.append(rows)
        self._place.append(place + np.int32(self._num_samples))
        self._size.append(sizes)
        self._num_samples += len(sources)
        self._num_rows += len(sizes)
        self._joined = None
        self._seconds += time.process_time() - begun

    @property
    def num_images(self) -> int:
        """Views of all planned sources together; 0 when there is nothing to look at."""
        return sum(int(s.images[s.rows].sum()) for s in self.sources)

    def notes(self) -> list[str]:
        """What a user should know before the first step, one line each: what is left out, cut or broken."""
        lines = []
        for s in self.sources:
            for shard, where in s.index.broken.items():
                lines.append(f"{s.name}: {shard} {where}; the samples before are used, write the shard again")
            for reason, gone in s.excluded.items():
                keys = ", ".join(
                    [*(s.index.key(row) for row in gone[:3].tolist()), *(["..."] if len(gone) > 3 else [])]
                )
                lines.append(f"{s.name}: {len(gone)} samples left out, {reason} ({keys})")
            if s.num_truncated:
                lines.append(f"{s.name}: {s.num_truncated} samples cut to max_tokens={self.max_tokens}")
        for first, weights in self.segments()[1:]:
            gone = ", ".join(name for name, w in zip(self.names, weights) if not w)
            shares = ", ".join(f"{name} {float(w):.1%}" for name, w in zip(self.names, weights) if w)
            lines.append(f"{gone} used up (max_epochs) after {first} samples; from there on the shares are {shares}")
        return lines

    def segments(self) -> list[tuple[int, list[Fraction]]]:
        """(first sample, weights) of each stretch of the planned steps, as `max_epochs` uses sources up; in order of
        arrival."""
        self.extend()
        planned = int(self._order().end[self.num_steps * self.batch_size])
        return [(first, weights) for first, weights in self._segments if first < planned]

    @property
    def _num_steps(self) -> int:
        return self._num_rows // self.batch_size

    def extend(self, num_steps: int | None = None) -> None:
        """Plan up to this many steps now (all of them unless told), so that forked workers share the result."""
        while self._num_steps < (num_steps or self.num_steps):
            if self._used_up:
                raise ValueError(
                    f"steps={self.num_steps}: every source has max_epochs, and together they last {self._num_steps} "
                    "steps; ask for fewer steps, or raise a source's max_epochs"
                )
            self._plan_window()
        if num_steps is None and self._cache is not None and self._seconds > KEEP_AFTER:
            self._seconds = 0.0
            self._keep()

    def __getstate__(self) -> dict:
        """For loader processes that are spawned and not forked: the finished order, without what makes more of it."""
        self.extend()
        self._order()
        return self.__dict__ | {"_passes": None, "_queues": None, "_schedule": None, "_cache": None}

    def _order(self) -> _Order:
        if self._joined is None:
            for pieces in (self._source, self._row, self._place, self._size):
                pieces[:] = [np.concatenate(pieces)] if pieces else [np.empty(0, dtype=np.int32)]
            end = np.concatenate([[0], np.cumsum(self._size[0], dtype=np.int64)])
            self._joined = _Order(self._source[0], self._row[0], self._place[0], end)
        return self._joined

    def step(self, i: int) -> Step:
        """Optimiser step i, planning as far as needed.

        Raises:
            IndexError: beyond the end of the plan.
        """
        if not 0 <= i < self.num_steps:
            raise IndexError(f"step {i} of a plan of {self.num_steps} steps")
        self.extend(i + 1)
        order = self._order()
        first = i * self.batch_size
        ends = order.end[first : first + self.batch_size + 1].tolist()
        place = order.place[ends[0] : ends[-1]]
        sources, rows = order.source[place], order.row[place]
        answers = sum(int(s.answer[rows[sources == k]].sum()) for k, s in enumerate(self.sources))
        pairs = list(zip(sources.tolist(), rows.tolist()))
        return Step([pairs[a - ends[0] : b - ends[0]] for a, b in zip(ends, ends[1:])], answers)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch): the epoch to which the step's first sample belongs."""
        self.extend(step + 1)
        starts = self._order().end[: (step + 1) * self.batch_size : self.batch_size]
        epoch = int(starts[step]) // self.epoch_samples
        return epoch, step - int(np.searchsorted(starts, epoch * self.epoch_samples))

    def _arrivals(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        while self._num_samples < n and not self._used_up:
            self._plan_window()
        order = self._order()
        return order.source[:n], order.row[:n]

    def first_samples(self, n: int) -> list[tuple[int, int]]:
        """(source number, row of its index) of the first n samples, as scheduled."""
        return list(zip(*(column.tolist() for column in self._arrivals(n))))

    def costs(self, n: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
        """(source number, cost in the unit) of the first n samples, as scheduled."""
        if unit not in UNITS:
            raise ValueError(f"unit={unit} is not one of {', '.join(UNITS)}")
        sources, rows = self._arrivals(n)
        costs = np.empty(len(sources), dtype=np.int64)
        for i, source in enumerate(self.sources):
            costs[sources == i] = source.costs(unit)[rows[sources == i]]
        return sources, costs

    def shares(self, n: int, unit: str | None = None) -> dict[str, float]:
        """Realised share of every source after n planned samples, in a unit (the mixture's own unless told)."""
        sources, costs = self.costs(n, unit or self.unit)
        served = np.bincount(sources, weights=costs, minlength=len(self.sources))
        return {s.name: float(x) for s, x in zip(self.sources, served / served.sum())}

    def largest_error(self, n: int) -> dict[str, float]:
        """Largest distance of every source from its share over all prefixes of n samples, in largest samples' worth."""
        sources, costs = self.costs(n, self.unit)
        worth = max(int(s.costs(self.unit)[s.rows].max()) for s in self.sources)
        errors = self._errors(sources, costs)
        return {s.name: float(np.abs(e).max()) / worth for s, e in zip(self.sources, errors)}

    def _errors(self, sources: np.ndarray, costs: np.ndarray):
        """`prefix_error` of every source in turn; sources that are used up begin the count anew."""
        firsts = [first for first, _ in self._segments if first < len(sources)]
        for i in range(len(self.sources)):
            pieces = [
                prefix_error(sources[a:b], costs[a:b], i, weights[i])
                for a, b, (_, weights) in zip(firsts, [*firsts[1:], len(sources)], self._segments)
            ]
            yield np.concatenate(pieces)

    def largest_step_error(self) -> float:
        """As `largest_error`, but as the optimiser sees it: over the ends of steps, in the order of the rows.

        Within a window packing changes the order of samples, so this is some samples' worth; at its end it is one.
        """
        self.extend()
        order, rows = self._order(), self.num_steps * self.batch_size
        place = order.place[: order.end[rows]]
        sources, costs = self.costs(self._num_samples, self.unit)
        sources, costs = sources[place], costs[place]
        worth = max(int(s.costs(self.unit)[s.rows].max()) for s in self.sources)
        ends = order.end[self.batch_size : rows + 1 : self.batch_size] - 1
        ends = ends[ends >= 0]
        return float(max(np.abs(e[ends]).max() for e in self._errors(sources, costs))) / worth

    def packing_efficiency(self) -> dict[str, float]:
        """Over the planned steps: the share of the token and of the image budget that is used (`filled_tokens`,
        `filled_images`), samples a row, and `padding`: the share of positions that are padding when every row is as
        long as the longest of its step."""
        tokens, images = self.row_sizes()
        skipped = 0 if self.after is None else self.after.step
        tokens, images = tokens[skipped:], images[skipped:]
        samples = int(self._order().end[self.num_steps * self.batch_size])
        return {
            "filled_tokens": float(tokens.sum() / (tokens.size * self.max_tokens)),
            "filled_images": float(images.sum() / (images.size * self.max_images)),
            "samples_per_row": float(samples / tokens.size),
            "padding": float(1 - tokens.sum() / (tokens.max(axis=1) * self.batch_size).sum()),
        }

    def row_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and images of every row: two int64 (steps, rows of a step)."""
        self.extend()
        order, rows = self._order(), self.num_steps * self.batch_size
        place = order.place[: order.end[rows]]
        lengths, images = np.empty(len(place), dtype=np.int64), np.empty(len(place), dtype=np.int64)
        sources, rows_of = order.source[place], order.row[place]
        for i, source in enumerate(self.sources):
            here = sources == i
            lengths[here], images[here] = source.length[rows_of[here]], source.images[rows_of[here]]
        totals = (np.concatenate([[0], np.cumsum(column)]) for column in (lengths, images))
        tokens, images = (np.diff(t[order.end[: rows + 1]]).reshape(self.num_steps, -1) for t in totals)
        return tokens, images

    def report(self, prefixes: tuple[int, ...] = (100, 1000, 10000)) -> dict:
        """What the plan will do, in plain numbers: ready for JSON.

        Per source: target share, realised shares in all units after each prefix of samples, samples it holds, passes
        over it (`epochs`) in all steps, what is left out and why (with up to ten keys), truncated samples.
        """
        self.extend()
        planned = int(self._order().end[self.num_steps * self.batch_size])
        errors = self.largest_error(max(planned, 1))
        place = self._order().place[:planned]
        seen = np.bincount(self._order().source[place], minlength=len(self.sources))
        realised = {u: {n: self.shares(n, u) for n in (*prefixes, planned)} for u in UNITS}
        per_source = {}
        for i, source in enumerate(self.sources):
            per_source[source.name] = {
                "target": float(self.weights[i]),
                "share": {u: {str(n): v[source.name] for n, v in realised[u].items()} for u in UNITS},
                "largest_error": errors[source.name],
                "samples": len(source.rows),
                "planned": int(seen[i]),
                "epochs": float(seen[i] / len(source.rows)),
                "truncated": source.num_truncated,
                "excluded": {
                    reason: {"count": len(gone), "keys": [source.index.key(row) for row in gone[:10].tolist()]}
                    for reason, gone in source.excluded.items()
                },
                "broken_shards": source.index.broken,
            }
        return {
            "fingerprint": self.fingerprint,
            "unit": self.unit,
            "num_steps": self.num_steps,
            "samples": planned,
            "epochs": planned / self.epoch_samples,
            "packing": self.packing_efficiency(),
            "largest_step_error": self.largest_step_error(),
            "segments": [[first, [float(w) for w in weights]] for first, weights in self.segments()],
            "sources": per_source,
        }


@dataclass
class _Order:
    source: np.ndarray
    row: np.ndarray
    place: np.ndarray
    end: np.ndarray  # int64 (rows + 1): row r holds place[end[r] : end[r + 1]]
