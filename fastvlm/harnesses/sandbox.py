"""Run a program a model wrote: no network, no files but its own folder, bounded time, memory, processes and files.

Linux only. Namespaces cut it off the network and other processes (unshare(2)), Landlock off the file system
(https://docs.kernel.org/userspace-api/landlock.html). Where the kernel grants one of these not, nothing is run. What
holds, for root as for any user:

- time: the program and all it started are killed at the limit.
- files: its folder is a file system of `files_mb`, and 4,096 files; what it prints is a file of at most as much beside.
- memory: `memory_mb` of address space a process; and all processes together are stopped where their resident memory,
  shared pages shared out, is more than that when it is looked at, every 20 ms. Memory that no process maps cannot be
  had by memfd_create(2) or System V; what the kernel itself keeps for pipes and sockets is not counted.
- processes: stopped at more than 64, looked at as often; the kernel makes no more than 128, threads included (before
  Linux 5.14 the user's other processes among them). The kernel lets root have any number, so root's programs run as
  `nobody`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fastvlm.harnesses import confined

MAX_OUTPUT = 4000  # characters that are kept of what it said


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    said: str  # the end of what it wrote to both streams
    seconds: float
    timed_out: bool = False


def run_python(program: str, *, seconds: float | int = 5, memory_mb: int = 1024, files_mb: int = 16) -> Outcome:
    """Run a program in a process and a folder of its own; it passes where its last line is reached.

    Args:
        seconds: of wall time, and of CPU time a process.
        memory_mb: of address space a process, and of resident memory of all of them.
        files_mb: of all files it writes, and of what it prints.

    Raises:
        ValueError: this machine cannot cut a program off.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        # An exit halfway is no pass: the end says a random word. That is against mistakes, not against intent: what
        # runs inside a process can do whatever its end would do, this word stands in the program's own file, and no
        # check in the same process as the program is beyond its reach (HumanEval's own code is no different).
        word = secrets.token_hex(16)
        Path(folder, "program.py").write_text(f"{program}\n\nprint({word!r}, flush=True)\n", encoding="utf-8")
        started = time.monotonic()
        command = [sys.executable, "-I", confined.__file__, folder, str(seconds), str(memory_mb), str(files_mb)]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=(log := open(Path(folder, "said"), "w+b")),  # noqa: SIM115
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds + 2)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:
            # The first process of the namespace is a child of ours: with it everything it started ends.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(max(0, log.seek(0, os.SEEK_END) - MAX_OUTPUT))
        said = log.read().decode(errors="replace")
        log.close()
    if code == confined.UNAVAILABLE:
        raise ValueError(f"code written by a model is not run here: {said.strip()}")
    took = time.monotonic() - started
    passed = code == 0 and said.endswith(f"{word}\n")
    return Outcome(passed, said.removesuffix(f"{word}\n"), took, timed_out=not passed and took >= seconds)


def check_sandbox() -> None:
    """Raises:
    ValueError: this machine cannot cut a program off, or none runs so.
    """
    if not (outcome := run_python("pass", seconds=60)).passed:
        raise ValueError(f"code written by a model is not run here: an empty program fails: {outcome.said.strip()}")
