"""The confined side of `sandbox`: run by its path, in an interpreter of its own, with the standard library alone.

The first process makes the namespaces and watches; the second gives up all it must not have and becomes the program.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

FAILED, UNAVAILABLE = 1, 97  # exit statuses: the program's own, or it was stopped; nothing was run
PROCESSES = 64  # at once; more and the program is stopped
TASKS = 128  # processes and threads at once; the kernel makes no more
FILES = 4096  # files and folders
TICK = 0.02  # seconds between two looks at memory and processes

USER, NETWORK, PROCESS_IDS, SYSTEM_V, MOUNTS = 0x10000000, 0x40000000, 0x20000000, 0x08000000, 0x00020000
NOBODY = 65534  # the program's user and group in its namespace
SETGID, SETUID, SETFCAP = 1 << 6, 1 << 7, 1 << 31  # what it takes to name users of a namespace (capabilities(7))
READ_ANY = 2  # CAP_DAC_READ_SEARCH
NOSUID, NODEV = 2, 4
DEATH_SIGNAL, KEEP_CAPABILITIES, SECCOMP, NO_NEW_PRIVILEGES, AMBIENT = 1, 8, 22, 38, 47  # of prctl(2)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
READ = 0b1101  # execute, read a file, read a folder
EVERYTHING = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # rights of the file system by Landlock's version
FILE_RIGHTS = 0b111 | 1 << 14
# Memory without a process that maps it, or a file that a limit knows, is in nobody's sum. By architecture: its name for
# seccomp(2), and memfd_create, memfd_secret, shmget, semget, msgget.
UNCOUNTED = {"x86_64": (0xC000003E, (319, 447, 29, 64, 68)), "aarch64": (0xC00000B7, (279, 447, 194, 190, 186))}

LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """Raises:
    OSError: the call that gave `result` failed.
    """
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def names_users() -> bool:
    """Whether this process is root's and may say which users its namespace has: then the program's is not root.

    Raises:
        OSError: it is root's and may not: the kernel lets root have any number of processes.
    """
    if os.geteuid():
        return False
    status = Path("/proc/self/status").read_text()
    granted = int(status.split("CapEff:")[1].split()[0], 16)
    maps = [Path(f"/proc/self/{kind}_map").read_text().splitlines() for kind in ("uid", "gid")]
    spans = [[tuple(map(int, line.split())) for line in lines] for lines in maps]
    has_nobody = all(any(first <= NOBODY < first + count for first, _, count in lines) for lines in spans)
    needed = SETGID | SETUID | SETFCAP
    if granted & needed == needed and has_nobody:
        return True
    if any(first == outside == 0 for first, outside, _ in spans[0]):  # else an ordinary user's root, as in a container
        raise OSError(f"root that may not become user {NOBODY} (capabilities SETUID, SETGID, SETFCAP) has no bounds")
    return False


def enter_namespaces(*, named: bool) -> None:
    """Leave network, mounts, System V objects and (for children to come) process ids of this machine.

    Args:
        named: its users are those of this machine; else the one user NOBODY, who is ourselves.

    Raises:
        OSError: the kernel grants it not.
    """
    ours, (ready, say) = os.getpid(), os.pipe()
    if not (writer := os.fork()):  # who may write them has to stay outside
        os.close(say)
        os.read(ready, 1)
        try:
            if not named:
                Path(f"/proc/{ours}/setgroups").write_text("deny")
            for kind, outside in (("uid", os.geteuid()), ("gid", os.getegid())):
                spans = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
                lines = [f"{first} {first} {count}" for first, _, count in spans]
                text = "\n".join(lines) if named else f"{NOBODY} {outside} 1"
                Path(f"/proc/{ours}/{kind}_map").write_text(text + "\n")
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    os.close(ready)
    left = LIBC.unshare(USER | NETWORK | PROCESS_IDS | SYSTEM_V | MOUNTS)
    reason = ctypes.get_errno()
    os.close(say)
    failed = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
    if left:
        raise OSError(reason, f"no namespaces of its own: {os.strerror(reason)}")
    if failed:
        raise OSError(failed, f"no users of its own: {os.strerror(failed)}")


def mount_folder(folder: str, *, files_mb: int) -> None:
    """Put a file system of bounded size over the folder, which only this process and its children see.

    Raises:
        OSError: the kernel grants it not.
    """
    program = Path(folder, "program.py").read_bytes()
    options = f"size={files_mb << 20},nr_inodes={FILES},mode=0700,uid={NOBODY},gid={NOBODY}"
    mounted = LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(NOSUID | NODEV), options.encode())
    checked(mounted, "no folder of its own")
    os.chdir(folder)
    Path("program.py").write_bytes(program)


def become_nobody() -> None:
    """Be a user the kernel bounds, who still finds an interpreter in a folder of root's (Landlock says which)."""
    checked(LIBC.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0), "capabilities")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    granted = (ctypes.c_uint32 * 6)(*[1 << READ_ANY] * 3)  # effective, permitted, inheritable; the upper halves
    checked(LIBC.capset(header, granted), "capabilities")
    checked(LIBC.prctl(AMBIENT, 2, READ_ANY, 0, 0), "capabilities")


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
        (resource.RLIMIT_NPROC, TASKS),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    call = lambda number, *arguments: checked(LIBC.syscall(number, *arguments), "Landlock")
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
    checked(LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
    call(RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)
    refuse_uncounted_memory()


def refuse_uncounted_memory() -> None:
    """Answer the calls of UNCOUNTED as a kernel that has them not (ENOSYS).

    Raises:
        OSError: another architecture, or the kernel grants no filter.
    """
    machine = os.uname().machine
    if machine not in UNCOUNTED:
        raise OSError(f"no list of system calls for {machine}")
    architecture, calls = UNCOUNTED[machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
    kill, allow, no_such_call = 0x80000000, 0x7FFF0000, 0x00050000 | 38
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # x86's other table of the same calls
    for number in calls:
        lines += [(equal, 0, 1, number), (give, 0, 0, no_such_call)]
    lines += [(give, 0, 0, allow)]

    class Line(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_uint16), ("lines", ctypes.POINTER(Line))]

    program = Program(len(lines), (Line * len(lines))(*(Line(*line) for line in lines)))
    checked(LIBC.prctl(SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def descendants(first: int) -> Iterator[int]:
    """A process and all it has started: whose parent ended is a child of the namespace's first."""
    left = [first]
    while left:
        yield (pid := left.pop())
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                left += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue


def resident(pid: int) -> int:
    """Bytes of memory a process maps; what it shares counts in full."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError):
        return 0


def proportional(pid: int) -> int:
    """Bytes of memory a process maps; what n share counts a n-th."""
    try:
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[1].split()[0]) << 10
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        return resident(pid)


def watch(child: int, *, seconds: float, memory_mb: int) -> str | None:
    """Wait for a program to end; None, or what it has more of than it may."""
    ended, deadline = os.pidfd_open(child), time.monotonic() + seconds
    while not select.select([ended], [], [], TICK)[0]:
        if time.monotonic() > deadline:
            return f"{seconds:g} seconds"
        pids = []
        for pid in descendants(child):
            pids.append(pid)
            if len(pids) > PROCESSES:
                return f"{PROCESSES} processes"
        most = memory_mb << 20
        # What forks share is in every one's resident set; the just sum takes longer.
        if sum(map(resident, pids)) > most and sum(map(proportional, pids)) > most:
            return f"{memory_mb} MB of memory"
    return None


def main(folder: str, seconds: str, memory_mb: str, files_mb: str) -> int:
    """Run `folder/program.py`: 0, FAILED, or UNAVAILABLE where it cannot be confined."""
    try:
        named = names_users()
        if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            raise OSError("/proc shows no children of a process")
        enter_namespaces(named=named)
        mount_folder(folder, files_mb=int(files_mb))
    except OSError as error:
        print(f"cannot be confined: {error}", flush=True)
        return UNAVAILABLE
    told, tell = os.pipe()  # the program does not have it: what comes through is of the time before
    if not (child := os.fork()):
        try:
            if named:
                become_nobody()
            LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL)  # with us ends the first process, and with it the namespace
            confine(folder, seconds=float(seconds), memory_mb=int(memory_mb), files_mb=int(files_mb))
            os.execve(sys.executable, [sys.executable, "-I", os.path.join(folder, "program.py")], os.environ)
        except (OSError, ValueError) as error:
            os.write(tell, str(error).encode())
        os._exit(FAILED)
    os.close(tell)
    if error := os.read(told, 1000):
        print(f"cannot be confined: {error.decode()}", flush=True)
        return UNAVAILABLE
    if over := watch(child, seconds=float(seconds), memory_mb=int(memory_mb)):
        os.kill(child, signal.SIGKILL)  # no process of the namespace outlives its first, and none is added
    status = os.waitpid(child, 0)[1]
    if over:
        print(f"\nstopped: more than {over}", flush=True)
    return FAILED if over or status else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
