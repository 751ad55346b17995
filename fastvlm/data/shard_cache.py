"""A bounded cache folder of remote shards, shared by all processes of a machine and safe if any of them is killed.

    $FASTVLM_CACHE     the folder (~/.cache/fastvlm)
    $FASTVLM_CACHE_GB  its maximum size in GB (50)

`shards/<digest>-<name>` is a complete shard, `shards/<digest>-<name>.part-<size>` one that is being downloaded. A lock
(flock) on the file itself tells who reads or writes it, so a killed process leaves nothing locked. Downloads are
appended; the next process continues where the last one stopped. A complete, checked file gets its name by atomic
rename. When space is needed, the least recently used shards are deleted, but never one that is being read or written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvlm.data.remote import BLOCK, RemoteShard, Unavailable, give_up, open_at, status_of

PART = re.compile(r"\.part-(\d+)$")
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


class NoRoom(OSError):
    """A shard cannot be cached: because of the maximum size, the disk, or a folder that cannot be written."""


class Damaged(OSError):
    """A shard that, downloaded twice, is not what was indexed."""


def cache_folder() -> Path:
    """Return `$FASTVLM_CACHE`, or `~/.cache/fastvlm` if it is not set."""
    return Path(os.environ.get("FASTVLM_CACHE") or Path.home() / ".cache/fastvlm").expanduser()


def cache_bytes() -> int:
    """Return the maximum size in bytes.

    Raises:
        ValueError: $FASTVLM_CACHE_GB is not a positive number.
    """
    text = os.environ.get("FASTVLM_CACHE_GB", "50")
    with suppress(ValueError):
        if float(text) > 0:
            return int(float(text) * 1e9)
    raise ValueError(f"FASTVLM_CACHE_GB={text} must be a number above 0, in GB")


class ShardCache:
    """The cache folder as one process sees it.

    Args:
        folder: the cache folder; None: `$FASTVLM_CACHE`.
        max_bytes: maximum size; None: `$FASTVLM_CACHE_GB`.
    """

    def __init__(self, folder: str | Path | None = None, *, max_bytes: int | None = None):
        self.folder = (Path(folder) if folder else cache_folder()) / "shards"
        self.max_bytes = cache_bytes() if max_bytes is None else max_bytes

    def path(self, shard: RemoteShard) -> Path:
        """Return where the complete copy of a shard is, or would be."""
        return self.folder / f"{shard.digest}-{shard.name}"

    def open(self, shard: RemoteShard) -> int:
        """Return a file descriptor of the local copy, fetching it if needed; the copy is kept while it is open.

        Raises:
            NoRoom, Damaged: see these classes.
            Unavailable: the shard cannot be fetched.
        """
        while True:
            with suppress(FileNotFoundError, NotADirectoryError):
                fd = os.open(self.path(shard), os.O_RDONLY)
                fcntl.flock(fd, fcntl.LOCK_SH)
                if os.fstat(fd).st_nlink:  # otherwise it was evicted between the two
                    with suppress(OSError):
                        os.utime(fd)
                    return fd
                os.close(fd)
            self.fetch(shard)

    def fetch(self, shard: RemoteShard, *, wait: bool = True) -> bool:
        """Download a shard if needed; return False if another process is doing so and `wait` is False.

        Raises:
            As `open`.
        """
        path = self.path(shard)
        part = self.folder / f"{path.name}.part-{shard.size or 0}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not path.exists():
                fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                    if not is_file(fd, part):
                        continue  # published or removed while we waited
                    if path.exists():
                        part.unlink()
                    else:
                        self._fill(shard, part, fd)
                        os.replace(part, path)
                except BlockingIOError:
                    return False
                finally:
                    os.close(fd)
        except OSError as error:
            if error.errno in UNWRITABLE:
                raise NoRoom(f"{self.folder}: {error.strerror}") from error
            raise
        return True

    def remove(self, shard: RemoteShard, fd: int) -> None:
        """Remove the copy of a shard if it is still the open file."""
        if is_file(fd, self.path(shard)):
            self.path(shard).unlink(missing_ok=True)

    def _fill(self, shard: RemoteShard, part: Path, fd: int) -> None:
        """Download into a locked part and check it; once more if it is damaged."""
        for _ in range(2):
            try:
                self._make_room(shard.size or 0)
                try:
                    download(shard, fd)
                except NoRoom:
                    if not self._evict(max(shard.size or 0, BLOCK)):
                        raise
                    download(shard, fd)
                if shard.size is None:
                    self._make_room(0)
            except NoRoom:
                part.unlink(missing_ok=True)
                raise
            wrong = shard.check(fd)
            if not wrong:
                return
            os.ftruncate(fd, 0)
        part.unlink(missing_ok=True)
        raise Damaged(f"{shard.url}: {wrong}, in two downloads; was it replaced after it was indexed?")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with open(self.folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (last used, bytes it has or will have, path) of every file, the least recently used first."""
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name == LOCK:
                    continue
                stat, coming = entry.stat(), PART.search(entry.name)
                size = max(stat.st_size, int(coming[1]) if coming else 0)
                found.append((stat.st_mtime, size, Path(entry.path)))
        return sorted(found)

    def _make_room(self, size: int) -> None:
        """Keep to the maximum size; a shard that is being downloaded counts as complete."""
        if size > self.max_bytes:
            raise NoRoom(f"a shard of {size} bytes is more than the cache holds ({self.max_bytes}; FASTVLM_CACHE_GB)")
        with self._alone():
            excess = sum(s for _, s, _ in self._files()) - self.max_bytes
            if excess > 0 and self._evict(excess, locked=True) < excess:
                raise NoRoom(
                    f"{self.folder}: all that is in it is in use, and {excess} bytes more are needed than its bound of "
                    f"{self.max_bytes}; raise FASTVLM_CACHE_GB"
                )

    def _evict(self, size: int, *, locked: bool = False) -> int:
        """Delete at least `size` bytes of unused files, if there are as many; return how many."""
        if not locked:
            with self._alone():
                return self._evict(size, locked=True)
        freed = 0
        for _, bytes_here, path in self._files():
            if freed >= size:
                break
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_file(fd, path):
                        path.unlink()
                        freed += bytes_here
                finally:
                    os.close(fd)
        return freed


def is_file(fd: int, path: Path) -> bool:
    """Return whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def download(shard: RemoteShard, fd: int) -> None:
    """Complete a file that holds the first bytes of a shard, or none.

    Raises:
        Unavailable: it cannot be downloaded; what has arrived stays.
        NoRoom: the disk is full.
    """
    failures, reached = 0, os.fstat(fd).st_size
    while shard.size is None or os.fstat(fd).st_size != shard.size:
        start = os.fstat(fd).st_size
        if shard.size is None or start > shard.size:
            start = 0
        os.ftruncate(fd, start)
        try:
            with open_at(shard.url, start, version=shard.version) as (position, file):
                os.ftruncate(fd, position)
                while data := file.read(BLOCK):
                    write(fd, data, position)
                    position += len(data)
                    if shard.size is not None and position > shard.size:
                        break
            if position == shard.size or shard.size is None:
                return
            if position > shard.size:
                os.ftruncate(fd, 0)
                raise Unavailable(f"{shard.url}: more than the {shard.size} bytes it had; was it replaced?")
            raise ConnectionError(f"ended at byte {position} of {shard.size}")
        except NoRoom:
            raise
        except Exception as error:  # noqa: BLE001  every filesystem raises its own
            if status_of(error) == 416:
                os.ftruncate(fd, 0)
            gained, reached = os.fstat(fd).st_size > reached, max(reached, os.fstat(fd).st_size)
            failures = 1 if gained else failures + 1
            give_up(error, url=shard.url, failures=failures)


def write(fd: int, data: bytes, position: int) -> None:
    """Write all of `data` at a position.

    Raises:
        NoRoom: the disk is full.
    """
    view = memoryview(data)
    try:
        while view:
            count = os.pwrite(fd, view, position)
            position, view = position + count, view[count:]
    except OSError as error:
        if error.errno in FULL:
            raise NoRoom(f"the disk of the shard cache is full ({error.strerror})") from error
        raise
