"""The confined side of `sandbox`: a script run in a separate interpreter, with only the standard library.

The first process creates the namespaces and watches; the second drops its rights and becomes the program.
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

FAILED, UNAVAILABLE = 1, 97  # exit statuses: the program failed or was stopped; nothing was run
PROCESSES = 64  # the program is stopped if it has more
TASKS = 128  # processes and threads; the kernel refuses to create more
FILES = 4096  # files and folders
TICK = 0.02  # seconds between checks of memory and processes

USER, NETWORK, PROCESS_IDS, SYSTEM_V, MOUNTS = 0x10000000, 0x40000000, 0x20000000, 0x08000000, 0x00020000
NOBODY = 65534  # the program's user and group in its namespace
SETGID, SETUID, SETFCAP = 1 << 6, 1 << 7, 1 << 31  # needed to map all users into a namespace (capabilities(7))
READ_ANY = 2  # CAP_DAC_READ_SEARCH
NOSUID, NODEV = 2, 4
DEATH_SIGNAL, KEEP_CAPABILITIES, SECCOMP, NO_NEW_PRIVILEGES, AMBIENT = 1, 8, 22, 38, 47  # of prctl(2)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
READ = 0b1101  # execute, read files, read folders
EVERYTHING = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # all file system rights, by Landlock version
FILE_RIGHTS = 0b111 | 1 << 14
# Calls that allocate memory which need not be mapped by a process or be a limited file, so that nothing counts it. By
# architecture: its id for seccomp(2), and the numbers of memfd_create, memfd_secret, shmget, semget, msgget.
UNCOUNTED = {"x86_64": (0xC000003E, (319, 447, 29, 64, 68)), "aarch64": (0xC00000B7, (279, 447, 194, 190, 186))}

LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """Return the result of a C call.

    Raises:
        OSError: the result is negative; has the call's errno.
    """
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def names_users() -> bool:
    """Return whether all users are mapped into the namespace, so that a program started by root runs as another user.

    Raises:
        OSError: this is root but may not do so; the kernel does not limit the number of root's processes.
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
    if any(first == outside == 0 for first, outside, _ in spans[0]):  # else root of a user namespace, as in a container
        raise OSError(f"root that may not become user {NOBODY} (capabilities SETUID, SETGID, SETFCAP) has no bounds")
    return False


def enter_namespaces(*, named: bool) -> None:
    """Enter new user, network, mount and System V namespaces; future children also enter a new PID namespace.

    Args:
        named: map all users of this machine; otherwise only the current user, as NOBODY.

    Raises:
        OSError: the kernel refuses.
    """
    ours, (ready, say) = os.getpid(), os.pipe()
    if not (writer := os.fork()):  # the id maps must be written from outside the namespace
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
    """Mount a file system of limited size over the folder, visible only to this process and its children.

    Raises:
        OSError: the kernel refuses.
    """
    program = Path(folder, "program.py").read_bytes()
    options = f"size={files_mb << 20},nr_inodes={FILES},mode=0700,uid={NOBODY},gid={NOBODY}"
    mounted = LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(NOSUID | NODEV), options.encode())
    checked(mounted, "no folder of its own")
    os.chdir(folder)
    Path("program.py").write_bytes(program)


def become_nobody() -> None:
    """Switch to a user whose processes the kernel limits, but who may still read an interpreter in root's folders.

    Landlock (`confine`) restricts what can be read.
    """
    checked(LIBC.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0), "capabilities")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    granted = (ctypes.c_uint32 * 6)(*[1 << READ_ANY] * 3)  # effective, permitted, inheritable; upper halves
    checked(LIBC.capset(header, granted), "capabilities")
    checked(LIBC.prctl(AMBIENT, 2, READ_ANY, 0, 0), "capabilities")


def confine(folder: str, *, seconds: float, memory_mb: int, files_mb: int) -> None:
    """Irrevocably restrict this process to what a program may have.

    Raises:
        OSError: the kernel refuses.
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
        )  # a packed struct: 64 bits of rights, 32 of the file descriptor
        call(ADD_RULE, ruleset, 1, ctypes.byref(rule), ctypes.c_uint32(0))
        os.close(place)
    checked(LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
    call(RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)
    refuse_uncounted_memory()


def refuse_uncounted_memory() -> None:
    """Make the calls in UNCOUNTED fail with ENOSYS, as if the kernel did not have them.

    Raises:
        OSError: the architecture is unknown, or the kernel refuses the filter.
    """
    machine = os.uname().machine
    if machine not in UNCOUNTED:
        raise OSError(f"no list of system calls for {machine}")
    architecture, calls = UNCOUNTED[machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
    kill, allow, no_such_call = 0x80000000, 0x7FFF0000, 0x00050000 | 38
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # x32's numbers of the same calls
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
    """Yield a process and all it started; orphans are children of the first process of the namespace."""
    left = [first]
    while left:
        yield (pid := left.pop())
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                left += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # the process has ended
            continue


def resident(pid: int) -> int:
    """Return the resident bytes of a process; shared memory counts in full."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError):
        return 0


def proportional(pid: int) -> int:
    """Return the resident bytes of a process; memory shared by n processes counts 1/n (PSS)."""
    try:
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[1].split()[0]) << 10
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        return resident(pid)


def watch(child: int, *, seconds: float, memory_mb: int) -> str | None:
    """Wait for a program to end; return None, or the limit it exceeded."""
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
        # Resident sets count memory shared by forks repeatedly; the exact sum takes longer.
        if sum(map(resident, pids)) > most and sum(map(proportional, pids)) > most:
            return f"{memory_mb} MB of memory"
    return None


def main(folder: str, seconds: str, memory_mb: str, files_mb: str) -> int:
    """Run `folder/program.py`; return 0, FAILED, or UNAVAILABLE if it cannot be confined."""
    try:
        named = names_users()
        if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            raise OSError("/proc shows no children of a process")
        enter_namespaces(named=named)
        mount_folder(folder, files_mb=int(files_mb))
    except OSError as error:
        print(f"cannot be confined: {error}", flush=True)
        return UNAVAILABLE
    told, tell = os.pipe()  # closed by exec, so it only carries errors from before the program
    if not (child := os.fork()):
        try:
            if named:
                become_nobody()
            LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL)  # if this watcher dies, the namespace ends, too
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
        os.kill(child, signal.SIGKILL)  # the kernel then kills all processes of the namespace
    status = os.waitpid(child, 0)[1]
    if over:
        print(f"\nstopped: more than {over}", flush=True)
    return FAILED if over or status else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
