"""Atomic file writes: a file is complete or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}
REFUSALS |= {errno.EEXIST, errno.ENAMETOOLONG}


def refusal(error: BaseException) -> str | None:
    """Return `<file>: <reason>` if the file system refused something (no permission, no space); None for the rest."""
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        return None
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it when the block ends and deleted if the block fails.

    A reader sees the old file or the new one. A killed process leaves a file named `.<name>.<process>.part`.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
