"""Run a program a model wrote: no network, no files but its own folder, bounded time, memory and output.

Linux only: namespaces cut it off the network and other processes (unshare(2)), Landlock off the file system
(https://docs.kernel.org/userspace-api/landlock.html), rlimits bound the rest. Where the kernel grants one of these not,
nothing is run.
"""

from __future__ import annotations

import ctypes
import os
import resource
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000  # user, network, process ids, System V IPC
NO_NEW_PRIVILEGES = 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
READ = 0b1101  # execute, read a file, read a folder
EVERYTHING = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # rights of the file system by Landlock's version
FILE_RIGHTS = 0b111 | 1 << 14
UNAVAILABLE = 97
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
        seconds: of wall time, and of CPU time.
        memory_mb: address space.
        files_mb: size of a file it writes.

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
        command = [sys.executable, "-I", __file__, folder, str(seconds), str(memory_mb), str(files_mb)]
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
    if code == UNAVAILABLE:
        raise ValueError(f"code written by a model is not run here: {said.strip()}")
    took = time.monotonic() - started
    passed = code == 0 and said.endswith(f"{word}\n")
    return Outcome(passed, said.removesuffix(f"{word}\n"), took, timed_out=not passed and took >= seconds)


def check_sandbox() -> None:
    """Raises:
    ValueError: this machine cannot cut a program off.
    """
    run_python("pass")


def confine(folder: str, *, seconds: float, memory_mb: int, files_mb: int) -> None:
    """Give up, in this process and for good, all that a program must not have.

    Raises:
        OSError: the kernel grants it not.
    """
    megabytes = 1 << 20
    for limit, value in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory_mb * megabytes),
        (resource.RLIMIT_FSIZE, files_mb * megabytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 128),
    ):
        resource.setrlimit(limit, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments) -> int:
        if (result := libc.syscall(number, *arguments)) < 0:
            raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
        return result

    version = call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    everything = EVERYTHING[min(version, max(EVERYTHING))]
    handled = ctypes.c_uint64(everything)
    ruleset = call(CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), ctypes.c_uint32(0))
    readable = {
        sys.prefix,
        sys.base_prefix,
        sysconfig.get_path("stdlib"),
        "/usr",
        "/lib",
        "/lib64",
        "/bin",
        "/etc/localtime",
    }
    for path, rights in [
        *((p, READ) for p in sorted(readable)),
        ("/dev/null", FILE_RIGHTS),
        ("/dev/urandom", READ),
        (folder, everything),
    ]:
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= FILE_RIGHTS
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = (ctypes.c_uint32 * 3)(
            rights & everything & 0xFFFFFFFF, 0, place
        )  # packed: 64 bits of rights, 32 of place
        call(ADD_RULE, ruleset, 1, ctypes.byref(rule), ctypes.c_uint32(0))
        os.close(place)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    call(RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def main(folder: str, seconds: str, memory_mb: str, files_mb: str) -> int:
    """The confined side: never returns into a process that could reach anything."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NAMESPACES):
        print(f"no namespaces of its own: {os.strerror(ctypes.get_errno())}", flush=True)
        return UNAVAILABLE
    if child := os.fork():
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, float(seconds))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status if status >= 0 else 128 - status
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the whole namespace ends with us
    try:
        confine(folder, seconds=float(seconds), memory_mb=int(memory_mb), files_mb=int(files_mb))
    except (OSError, ValueError) as error:
        print(f"cannot be confined: {error}", flush=True)
        os._exit(UNAVAILABLE)
    os.execve(sys.executable, [sys.executable, "-I", os.path.join(folder, "program.py")], os.environ)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
