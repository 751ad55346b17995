"""Progress of an evaluation: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import sys
import time


class Progress:
    """A context manager that shows progress when called with (done, total).

    Args:
        name: label, such as the task's name.
        shown: False on all ranks but the first.
        every: seconds between lines if stderr is not a terminal.
    """

    def __init__(self, name: str, *, shown: bool = True, every: float = 30.0):
        self.name, self.shown, self.every = name, shown, every
        self.start = self.last = time.monotonic()
        self.first: int | None = None
        self.bar = self.task = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(self.name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.fields[rate]}"), console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=None, rate="")
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        # Answers of an earlier run are loaded at once and must not count in the rate.
        self.first = done if self.first is None else self.first
        rate = (done - self.first) / (now - self.start) if now > self.start else 0.0
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, rate=f"{rate:.1f} questions/s" if rate else "")
        elif self.shown and (now - self.last > self.every):
            self.last = now
            print(f"{self.name}: {done} of {total} questions, {rate:.1f} questions/s", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()
