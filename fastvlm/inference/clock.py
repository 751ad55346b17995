"""Time, memory and floating-point operations of a call."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

TIMES = ("cpu", "wall")


class Clock:
    """A clock that waits for the device before each reading.

    Args:
        kind: `wall`, or `cpu`: CPU time of this thread, which is hardly affected by other load on the machine.

    Raises:
        ValueError: an unknown kind, or `cpu` with a GPU or with several threads.
    """

    def __init__(self, device: str | torch.device = "cpu", *, kind: str = "wall"):
        self.device = torch.device(device)
        if kind not in TIMES:
            raise ValueError(f"time={kind} is not one of {', '.join(TIMES)}")
        if kind == "cpu" and (self.device.type != "cpu" or torch.get_num_threads() > 1):
            raise ValueError("time=cpu counts one thread of a CPU: set threads=1, or time=wall")
        self.kind = kind

    @classmethod
    def steady(cls, device: str | torch.device) -> Clock:
        """Return the clock that other load disturbs least: `cpu` on a CPU with a single thread, else `wall`."""
        one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
        return cls(device, kind="cpu" if one_thread else "wall")

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.thread_time() if self.kind == "cpu" else time.perf_counter()

    def time(self, call: Callable[[], Any], *, repeats: int = 1, warm: int = 1) -> tuple[list[float], Any]:
        """Return the seconds of each repeat, and the result of the last; `warm` untimed calls run first."""
        for _ in range(warm):
            call()
        seconds, result = [], None
        for _ in range(repeats):
            result = None  # holding two results would double peak memory
            start = self.now()
            result = call()
            seconds.append(self.now() - start)
        return seconds, result


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the 90th, 95th and 99th percentile (nearest rank) and the maximum."""
    ordered = sorted(seconds)
    rank = lambda share: ordered[max(0, math.ceil(share * len(ordered) / 100) - 1)]
    return {"p50": statistics.median(ordered), **{f"p{s}": rank(s) for s in (90, 95, 99)}, "max": ordered[-1]}


def count_flops(call: Callable[[], Any]) -> int:
    """Count the FLOPs of a call's matrix products, convolutions and attention; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_bytes(device: str | torch.device = "cpu") -> int:
    """Return this process's peak memory so far in bytes: resident on a CPU, allocated on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
