"""Run a program written by a model: no network, only its own folder, limited time, memory, processes and files.

Linux only. Namespaces isolate the program from the network and other processes (unshare(2)), Landlock from the file
system (https://docs.kernel.org/userspace-api/landlock.html). If the kernel refuses either, nothing is run. Limits, for
root as for any other user:

- time: the program and everything it started are killed at the limit.
- files: its folder is a file system of `files_mb` and 4,096 files; its output is a separate file of at most that size.
- memory: `memory_mb` of address space per process; and the program is stopped if the resident memory of all its
  processes, shared pages counted proportionally, exceeds that at a check, every 20 ms. Memory that no process maps
  cannot be allocated by memfd_create(2) or System V calls; the kernel's memory for pipes and sockets is not counted.
- processes: stopped if there are more than 64 at such a check; the kernel allows no more than 128, threads included
  (before Linux 5.14 with the user's other processes). It does not limit root, so root's programs run as `nobody`.
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

MAX_OUTPUT = 4000  # bytes kept of the output


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    said: str  # the end of its stdout and stderr
    seconds: float
    timed_out: bool = False


def run_python(program: str, *, seconds: float | int = 5, memory_mb: int = 1024, files_mb: int = 16) -> Outcome:
    """Run a program in a process and folder of its own; it passes if it reaches its last line.

    Args:
        seconds: limit on wall time, and on CPU time per process.
        memory_mb: limit on the address space per process, and on the resident memory of all of them.
        files_mb: limit on the files it writes, and on its output.

    Raises:
        ValueError: programs cannot be confined on this machine.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        # An early exit must not pass, so a random word is printed at the end. This protects against mistakes, not
        # against intent: the word is in the program's own file, and no check in the process of the program is beyond
        # its reach (the same is true of HumanEval's own code).
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
            # Ends the watcher, with it the first process of the namespace, and so everything the program started.
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
    """Check that an empty program runs.

    Raises:
        ValueError: programs cannot be confined on this machine, or fail when confined.
    """
    if not (outcome := run_python("pass", seconds=60)).passed:
        raise ValueError(f"code written by a model is not run here: an empty program fails: {outcome.said.strip()}")
