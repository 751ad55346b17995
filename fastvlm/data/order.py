"""The order planned so far: when each sample comes and in which row, as columns that grow window by window."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from fastvlm.data.windows import Window


@dataclass(frozen=True)
class Columns:
    """The order as single arrays: row r holds the samples `place[end[r] : end[r + 1]]`."""

    source: np.ndarray  # int16 (samples,), in order of arrival (as scheduled)
    row: np.ndarray  # int32 (samples,): row of the source's index, in the same order
    place: np.ndarray  # int32 (samples,): arrival numbers in the order in which rows hold them
    end: np.ndarray  # int64 (rows + 1)


class Order:
    """The columns of complete windows, one after another.

    Args:
        num_empty: empty rows at the beginning, for steps that are already over.
    """

    def __init__(self, num_empty: int = 0):
        self.num_samples, self.num_rows = 0, num_empty
        self.segments: list[tuple[int, list[Fraction]]] = []  # (first sample, weights of the sources not used up)
        self.used_up = False  # every source is used up: no sample follows
        # Lists of one array per window, which `join` concatenates.
        self._source: list[np.ndarray] = []
        self._row: list[np.ndarray] = []
        self._place: list[np.ndarray] = []
        self._size: list[np.ndarray] = [np.zeros(num_empty, dtype=np.int32)] if num_empty else []
        self._joined: Columns | None = None

    def append(self, window: Window, *, batch_size: int) -> None:
        """Add a window; after the last one, empty rows complete the last step of `batch_size` rows."""
        size = window.size
        if window.is_last:
            size = np.pad(size, (0, -(self.num_rows + len(size)) % batch_size))
        self._source.append(window.source)
        self._row.append(window.row)
        self._place.append(window.place + np.int32(self.num_samples))
        self._size.append(size)
        self.num_samples += len(window.source)
        self.num_rows += len(size)
        self.segments, self.used_up = window.segments, window.is_last
        self._joined = None

    @property
    def columns(self) -> Columns:
        """The columns of all windows, concatenated."""
        self.join()
        return self._joined

    def join(self) -> None:
        """Concatenate the arrays of the windows."""
        if self._joined is None:
            for pieces in (self._source, self._row, self._place, self._size):
                pieces[:] = [np.concatenate(pieces)] if pieces else [np.empty(0, dtype=np.int32)]
            end = np.concatenate([[0], np.cumsum(self._size[0], dtype=np.int64)])
            self._joined = Columns(self._source[0], self._row[0], self._place[0], end)

    def save(self, folder: Path) -> None:
        """Write the order so that the next start need not plan; the folder appears complete, by rename."""
        columns, beside = self.columns, folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            beside.mkdir(parents=True, exist_ok=True)
            for name, column in (("source", columns.source), ("row", columns.row), ("place", columns.place)):
                np.save(beside / f"{name}.npy", column)
            np.save(beside / "size.npy", self._size[0])
            segments = [[first, [str(w) for w in weights]] for first, weights in self.segments]
            (beside / "segments.json").write_text(json.dumps({"segments": segments, "used_up": self.used_up}))
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(beside, folder)
        except OSError:  # a full disk, or another run was faster: the order is still in memory
            shutil.rmtree(beside, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> Order | None:
        """Load a saved order, memory-mapped; None if there is none or it is broken."""
        try:
            kept = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("source", "row", "place", "size")]
            state = json.loads((folder / "segments.json").read_text())
        except (OSError, ValueError):
            return None
        source, row, place, size = kept
        if not len(source) == len(row) == len(place) == int(size.sum(dtype=np.int64)):
            return None
        order = cls()
        order.num_samples, order.num_rows, order.used_up = len(source), len(size), state["used_up"]
        order.segments = [(first, [Fraction(w) for w in weights]) for first, weights in state["segments"]]
        order._source, order._row, order._place, order._size = ([column] for column in kept)
        return order
