"""Evaluation ranks: one process per rank, without communication. Each writes its windows; one reads them all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STARTED = "FASTVLM_EVALUATION_RANK"


@dataclass(frozen=True)
class Ranks:
    """The rank of this process; `rank` is None if the ranks are still to be started."""

    rank: int | None
    local: int
    count: int
    started: bool = False  # by `start_ranks`, whose process scores once all ranks are done

    @property
    def collects(self) -> bool:
        """Whether this process scores the answers of all ranks."""
        return not self.rank and not self.started


def find_ranks(wanted: int, environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return the rank set by torchrun or Slurm; else one rank per device, to be started if there are several.

    A Slurm step with a single task counts as a plain command: the ranks of its devices are still to be started, too.
    """
    torchrun, srun = ("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    for rank, local, count in (torchrun, srun):
        if rank in environment and count in environment:
            place = int(environment[rank]), int(environment.get(local, 0)), int(environment[count])
            if rank != "SLURM_PROCID" or place[2] > 1:
                return Ranks(*place, started=STARTED in environment)
    return Ranks(None if wanted > 1 else 0, 0, wanted)


def start_ranks(count: int, command: Sequence[str] | None = None) -> None:
    """Run the current command (or `command`) once per rank and wait; if one fails, terminate the others.

    Raises:
        ValueError: a rank failed; it has printed the reason.
    """
    command = [sys.executable, *sys.orig_argv[1:]] if command is None else list(command)
    started = [
        subprocess.Popen(
            command, env=os.environ | {STARTED: "1", "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(count)}
        )
        for r in range(count)
    ]
    try:
        left = dict(enumerate(started))
        while left:
            for rank, process in list(left.items()):
                try:
                    code = process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                del left[rank]
                if code:
                    raise ValueError(f"rank {rank} of {count} failed (exit status {code}); the same command goes on")
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait()
