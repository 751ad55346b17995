"""One process a rank, without a word between them: each writes the windows it answered, and one reads them all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STARTED = "FASTVLM_EVALUATION_RANK"


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is. `rank` is None where ranks are still to be started."""

    rank: int | None
    local: int
    count: int
    started: bool = False  # by `start_ranks`, whose process scores when all have answered

    @property
    def collects(self) -> bool:
        """Whether this process scores what all ranks answered."""
        return not self.rank and not self.started


def find_ranks(wanted: int, environment: Mapping[str, str] = os.environ) -> Ranks:
    """As torchrun or Slurm started this process; else one a device, still to be started where there are several.

    A step of one task is a shell's command run elsewhere, so its devices' ranks are still to be started as well.
    """
    torchrun, srun = ("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    for rank, local, count in (torchrun, srun):
        if rank in environment and count in environment:
            place = int(environment[rank]), int(environment.get(local, 0)), int(environment[count])
            if rank != "SLURM_PROCID" or place[2] > 1:
                return Ranks(*place, started=STARTED in environment)
    return Ranks(None if wanted > 1 else 0, 0, wanted)


def start_ranks(count: int, command: Sequence[str] | None = None) -> None:
    """Run this very command once a rank and wait; where one fails the others are ended.

    Raises:
        ValueError: a rank failed; it has said why.
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
