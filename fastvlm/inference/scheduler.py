"""Continuous batching: a thread that decodes step by step and adds waiting prompts to the batch between steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastvlm.inference.engine import Engine, Generation, finished
from fastvlm.inference.memory import image_key
from fastvlm.inference.rows import Row
from fastvlm.inference.sampling import Sampling


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The server stopped before the answer was complete."""


@dataclass(eq=False)
class Job:
    """One question. Progress is reported to `tell`: ("text", piece), ("done", Generation) or ("error", error).

    Args:
        tell: called from the scheduler's thread.
    """

    record: dict
    images: Sequence[torch.Tensor]
    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[str]
    seed: int
    tell: Callable[[str, Any], None]
    row: Row | None = None
    shown: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    queue_seconds: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Abandon the question; its row is dropped before the next step."""
        self.cancelled.set()


class Scheduler:
    """Serves questions in order of arrival, decoding up to `max_rows` answers at once.

    Between two decoding steps either one prompt is prefilled or one piece of other work (`call`) runs, which is no
    longer than a prefill; if both wait, they alternate. So answers in progress never wait for more than that.

    Args:
        max_rows: maximum number of answers decoded at once.
        max_waiting: maximum number of questions that wait for a row.

    Raises:
        ValueError: `max_rows` is below 1 or `max_waiting` below 0.
    """

    def __init__(self, engine: Engine, *, max_rows: int = 8, max_waiting: int = 64):
        if max_rows < 1 or max_waiting < 0:
            raise ValueError(f"max_rows={max_rows} must be 1 or more, max_waiting={max_waiting} 0 or more")
        self.engine, self.max_rows, self.max_waiting = engine, max_rows, max_waiting
        self.num_active, self.num_done, self.num_cancelled, self.num_tokens = 0, 0, 0, 0
        self._waiting: deque[Job] = deque()
        self._calls: deque[Call] = deque()
        self._active: list[Job] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._calls)

    def submit(self, job: Job) -> Job:
        """Queue a job.

        Raises:
            Busy: the queue is full, or the scheduler is stopping.
        """
        with self._wake:
            if self._stopping or self.num_waiting >= self.max_waiting + (self.num_active < self.max_rows):
                raise Busy
            self._waiting.append(job)
            self._wake.notify()
        return job

    async def call(self, work: Generator[None, None, Any]) -> Any:
        """Run a generator piece by piece between decoding steps and return its return value.

        Each piece has the model to itself; generators run one after another. Cancelling the call closes the generator
        before its next piece.

        Raises:
            Busy: the queue is full, or the scheduler is stopping.
            Stopped: the scheduler stopped before the generator was done.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._wake:
            if self._stopping or self.num_waiting >= self.max_waiting + 1:
                raise Busy
            self._calls.append(Call(work, loop, future))
            self._wake.notify()
        return await future

    def stop(self) -> None:
        """Stop the thread; unfinished jobs and calls get a `Stopped` error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    # -------------------------------------------------------------------------------------------------------- inside

    def _work(self) -> None:
        rows, read_last = self.engine.rows(strict=True), False
        while True:
            with self._wake:
                while not (self._waiting or self._calls or self._active or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    break
                job = call = None
                if self._calls and (read_last or not self._may_read()):
                    call = self._calls[0]
                elif self._may_read():
                    job = self._waiting.popleft()
                read_last = job is not None
                self.num_active = len(self._active) + read_last
            try:
                if call is not None and call.advance():
                    self._calls.popleft()
                if job is not None:
                    self._admit(job, rows)
                self._drop_cancelled(rows)
                rows.step()
                self._publish()
            except Exception as error:  # noqa: BLE001  one failed step must not end the thread
                for job in self._active:
                    job.tell("error", error)
                self._active, rows = [], self.engine.rows(strict=True)
            self.num_active = len(self._active)
        ended = Stopped("the server stops")
        for job in [*self._active, *self._waiting]:
            job.tell("error", ended)
        for call in self._calls:
            call.fail(ended)

    def _may_read(self) -> bool:
        return bool(self._waiting) and len(self._active) < self.max_rows

    def _admit(self, job: Job, rows) -> None:
        if job.cancelled.is_set():
            self.num_cancelled += 1
            return
        engine, start = self.engine, self.engine.now()
        job.queue_seconds = start - job.submitted
        try:
            visual = engine.encode_images(job.images)
            job.row = engine.row(
                job.record,
                visual,
                keys=[image_key(image) for image in job.images],
                sampling=job.sampling,
                max_new_tokens=job.max_new_tokens,
                stop=job.stop,
                seed=job.seed,
                image_seconds=engine.now() - start,
            )
            rows.add([job.row])
        except Exception as error:  # noqa: BLE001  an invalid question fails alone
            if job.row is not None:
                rows.drop(job.row)
            job.tell("error", error)
            return
        self._active.append(job)
        self._publish()

    def _drop_cancelled(self, rows) -> None:
        for job in [job for job in self._active if job.cancelled.is_set()]:
            rows.drop(job.row)
            self._active.remove(job)
            self.num_cancelled += 1
        with self._wake:  # cancelled jobs would take up places in the queue
            left = [job for job in self._waiting if job.cancelled.is_set()]
            for job in left:
                self._waiting.remove(job)
            self.num_cancelled += len(left)

    def _publish(self) -> None:
        for job in list(self._active):
            if job.row.error is not None:
                self._active.remove(job)
                job.tell("error", job.row.error)
                continue
            answer = job.row.answer
            text = answer.text() if answer.finish_reason else answer.settled_text()
            if piece := text[job.shown :]:
                job.shown = len(text)
                job.tell("text", piece)
            if answer.finish_reason:
                generation: Generation = finished(job.row)
                self._active.remove(job)
                self.num_done += 1
                self.num_tokens += len(generation.token_ids)
                job.tell("done", generation)


@dataclass(eq=False)
class Call:
    """A generator run in pieces for a caller that awaits its result in an event loop."""

    work: Generator[None, None, Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future

    def advance(self) -> bool:
        """Run the next piece; return whether the call is over (finished, failed or cancelled)."""
        if self.future.cancelled():
            self.work.close()
            return True
        try:
            next(self.work)
        except StopIteration as end:
            self._settle("set_result", end.value)
        except Exception as error:  # noqa: BLE001  handed to whoever called
            self._settle("set_exception", error)
        else:
            return False
        return True

    def fail(self, error: Exception) -> None:
        self.work.close()
        self._settle("set_exception", error)

    def _settle(self, how: str, result: Any) -> None:
        def settle() -> None:
            if not self.future.done():
                getattr(self.future, how)(result)

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(settle)
