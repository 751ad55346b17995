"""Shards on local disks and remote servers: which shards a source's path names, and reading them with retries.

Everything goes through fsspec (`http(s)://`, `s3://`, `gs://`, `hf://` and whatever else is registered there); `pipe:`
commands go through webdataset's opener. A folder behind HTTP cannot be listed: either `shards.json` beside the shards
names them, or the path is a brace pattern.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.data.listing import LISTING, check_listed, listed, split_of

ATTEMPTS = 5  # consecutive failures, without a byte gained, before a file is given up
BACKOFF = 0.5  # seconds before the second attempt; doubled for each one after
TIMEOUT = 60  # seconds without a byte
BLOCK = 8 << 20  # bytes per read, and per request where requests name a range
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://|pipe:")
# Keys under which filesystems report a file's content, the most reliable first, then its time.
VERSIONS = ("versionid", "etag", "md5hash", "crc32c", "xet_hash", "blob_id", "oid")
VERSIONS += ("last-modified", "lastmodified", "last_modified", "last_commit", "updated", "mtime", "modified", "created")


class Unavailable(OSError):
    """A remote file that cannot be read: it is missing, access is denied, or all attempts failed."""


@dataclass(frozen=True)
class RemoteShard:
    """A shard behind a URL, as it was when the source was opened."""

    url: str
    size: int | None  # bytes; None if the server does not report it
    version: str = ""  # ETag, hash or time of the last change, if there is one
    # (offset, size, CRC-32) of its samples, once its index is open
    spans: tuple[np.ndarray, np.ndarray, np.ndarray] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return file_name(self.url)

    @property
    def digest(self) -> str:
        """Hash that differs when the content does, as far as the server reports that."""
        return hashlib.sha256(f"{self.url}\0{self.size}\0{self.version}".encode()).hexdigest()[:20]

    def check(self, fd: int) -> str:
        """Compare a local copy with the index; return what is wrong with it, "" for nothing."""
        if self.spans is None:
            return ""
        spans = zip(*(column.tolist() for column in self.spans))
        wrong = sum(zlib.crc32(os.pread(fd, size, offset)) != crc32 for offset, size, crc32 in spans)
        return f"{wrong} of {len(self.spans[0])} samples are not those of its index (CRC-32)" if wrong else ""


def is_remote(path: Any) -> bool:
    """Return whether a path is a URL or a `pipe:` command, not a local path."""
    return isinstance(path, str) and SCHEME.match(path) is not None and not path.startswith(("file://", "local://"))


def file_name(location: str) -> str:
    """Return the last component of a path or URL; of a `pipe:` command, the last word that names a tar."""
    if location.startswith("pipe:"):
        found = re.findall(r"[^/\s'\"]+\.tar\b", location)
        return found[-1] if found else hashlib.sha256(location.encode()).hexdigest()[:12] + ".tar"
    return location.split("?")[0].rstrip("/").rsplit("/", 1)[-1]


def beside(url: str, name: str) -> str:
    """Return the URL of another file in the same folder, without the query: a signature holds for one file only."""
    return f"{url.split('?')[0].rsplit('/', 1)[0]}/{name}"


def locate_shards(path: str | Path | Sequence[str], split: str, names: str | None = None) -> list[Path | RemoteShard]:
    """Return the shards of a split: of a remote folder by name, of a list or brace pattern in the given order.

    In a list or pattern, a name without a split (`00000.tar`, as img2dataset writes them) belongs to `train`.

    Args:
        names: of a folder, take the shards of this pattern or range instead of `<split>-*.tar`.

    Raises:
        ValueError: the path cannot be listed, a shard it names cannot be found, or `names` is given with a path that
            names shards itself.
    """
    given = [str(p) for p in path] if isinstance(path, (list, tuple)) else [str(path)]
    given = [p if is_remote(p) else os.path.expanduser(re.sub(r"^(file|local)://", "", p)) for p in given]
    one = given[0] if len(given) == 1 else ""
    named = isinstance(path, (list, tuple)) or one.endswith(".tar") or one.startswith("pipe:")
    if named and names is not None:
        more = f" and {len(given) - 1} more" if len(given) > 1 else ""
        raise ValueError(f"{given[0]}{more}: shards={names} is for a folder, and this path names its own; drop shards=")
    is_file = named or "{" in one
    if names is not None and not any(c in names for c in "*?["):
        given = [f"{one.rstrip('/')}/{names}"]
    elif is_remote(one) and not is_file:
        return list_folder(one, split, names or f"{split}-*.tar")
    import braceexpand

    try:
        found = [url for pattern in given for url in braceexpand.braceexpand(pattern)]
    except braceexpand.UnbalancedBracesError:
        raise ValueError(f"{path}: unbalanced braces; a pattern is like train-{{00000..00099}}.tar") from None
    return describe([url for url in found if split_of(file_name(url)) == split])


def list_folder(url: str, split: str, pattern: str) -> list[RemoteShard]:
    """List the shards `<url>/<pattern>` of the split by name; behind HTTP, those that the listing has of it.

    Raises:
        ValueError: the folder cannot be listed, or a shard that its listing names is missing.
    """
    url = url.rstrip("/")
    where = f"{url}/{LISTING}"
    if not url.startswith(("http://", "https://")):
        try:
            found = retry(lambda: _filesystem(url).glob(f"{_inside(url)}/{pattern}", detail=True), url=url)
            listing = read_if_there(where)
        except Unavailable as error:
            raise ValueError(f"{error}; check the address and the credentials") from None
        inside = _inside(url)  # what fsspec returns lacks the URL's host or account
        places = {f"{url}/{path.removeprefix(inside).lstrip('/')}": info for path, info in found.items()}
        shards = [RemoteShard(place, info["size"], version_of(info)) for place, info in places.items()]
        shards = [shard for shard in shards if split_of(shard.name) in (split, "train")]
        if listing is not None:
            names = listed(listing, split, [pattern], where=where)
            check_listed(names, (shard.name for shard in shards), where=where)
        return sorted(shards, key=lambda shard: shard.name)
    try:
        listing = read_small(where)
    except Unavailable as error:
        raise ValueError(
            f"{error}; a folder behind HTTP needs {LISTING} (`python -m fastvlm.data.index` writes it), or give the "
            f"shards themselves: path={url}/{split}-{{00000..00099}}.tar"
        ) from None
    return describe([f"{url}/{name}" for name in listed(listing, split, [pattern], where=where)])


def describe(locations: Sequence[str]) -> list[Path | RemoteShard]:
    """Return the shards at these locations; the size and version of remote ones are looked up in parallel.

    Raises:
        ValueError: a shard does not exist; the message names it.
    """

    def look(location: str) -> Path | RemoteShard:
        fix = "put it back, or leave it out of the source's path"
        if "*" in location:
            folder = os.path.dirname(location.split("*")[0])
            pattern = location.removeprefix(folder).lstrip("/")
            fix = f"a path takes no *: set path={folder or '.'} and shards={pattern!r}"
        if not is_remote(location):
            if not Path(location).is_file():
                raise ValueError(f"{location}: no such shard; {fix}")
            return Path(location)
        if location.startswith("pipe:"):
            return RemoteShard(location, None)
        try:
            info = retry(lambda: _info(location), url=location)
        except Unavailable as error:
            raise ValueError(f"{error}; {fix}") from None
        return RemoteShard(location, info.get("size"), version_of(info))

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(look, locations))


def version_of(info: dict) -> str:
    """Return what a filesystem reports about a file's content: a version or hash if it has one, else a time."""
    lower = {key.lower(): value for key, value in info.items()}
    for key in VERSIONS:
        if lower.get(key) not in (None, "", "null"):
            return str(lower[key])
    return ""


def retry(action: Callable[[], Any], *, url: str) -> Any:
    """Call `action`, which accesses a remote file, until it succeeds.

    Raises:
        Unavailable: it never will, or did not in ATTEMPTS attempts.
    """
    for failures in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:  # noqa: BLE001  every filesystem raises its own
            give_up(error, url=url, failures=failures)
    raise AssertionError


def give_up(error: Exception, *, url: str, failures: int) -> None:
    """Raise Unavailable if a failure is permanent or one too many; otherwise wait."""
    if isinstance(error, Unavailable):
        raise error
    if is_permanent(error):
        raise Unavailable(f"{url}: {reason(error)}") from error
    if failures >= ATTEMPTS:
        raise Unavailable(f"{url}: {reason(error)}; gave up after {failures} attempts") from error
    time.sleep(BACKOFF * 2 ** (failures - 1) * random.uniform(0.5, 1.5))  # noqa: S311


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status in an error of aiohttp, Hugging Face, botocore or gcsfs; None if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # aiohttp's `code` is not the server's: it is 400 for a truncated body.
    code = getattr(error, "code", None) if type(error).__module__.startswith("gcsfs") else None
    for value in (getattr(error, "status", None), getattr(response, "status_code", response), code):
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return None


def is_permanent(error: Exception) -> bool:
    """Return whether trying again is useless."""
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 416, 425, 429)
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, TypeError)
    return isinstance(error, (*kinds, NotImplementedError)) or "Credentials" in type(error).__name__


def is_missing(error: BaseException | None) -> bool:
    """Return whether an error says that the file does not exist."""
    return isinstance(error, FileNotFoundError) or (error is not None and status_of(error) == 404)


def reason(error: Exception) -> str:
    """Return one line on what went wrong, with the HTTP status if there is one."""
    status, text = status_of(error), (str(error).splitlines() or [""])[0]
    if is_missing(error):
        return "not found"
    return f"{getattr(error, 'message', '') or text or type(error).__name__}"[:200] + (f" ({status})" if status else "")


def _filesystem(url: str):
    """Return fsspec's instance. Ask for it each time: fsspec caches instances, and they do not survive a fork."""
    import fsspec

    protocol, options = url.split("://")[0], {}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        options["client_kwargs"] = {"timeout": timeout}
        options["headers"] = {"Accept-Encoding": "identity"}  # otherwise a server may count compressed bytes
    elif protocol in ("s3", "s3a"):
        own = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT} | own
    else:  # whose URL may name a host, an account or a repository
        options = fsspec.get_filesystem_class(protocol)._get_kwargs_from_urls(url)
    # Its cache of listings may be older than the files.
    return fsspec.filesystem(protocol, use_listings_cache=False, **options)


def _inside(url: str) -> str:
    return _filesystem(url)._strip_protocol(url)


def _info(url: str) -> dict:
    fs = _filesystem(url)
    if not url.startswith(("http://", "https://")):
        return fs.info(url)
    # fsspec's own `info` reports every failure as a missing file.
    from fsspec.asyn import sync

    async def head() -> dict:
        session = await fs.set_session()
        options = {"headers": fs.kwargs["headers"], "allow_redirects": True}
        async with session.head(url, **options) as answer:
            if answer.status < 400 and "Content-Length" in answer.headers:
                return dict(answer.headers) | {"size": int(answer.headers["Content-Length"])}
            if answer.status not in (403, 405, 501) and answer.status >= 400:
                answer.raise_for_status()
        # The server does not answer HEAD (a signed URL is valid for GET alone).
        options["headers"] = {**options["headers"], "Range": "bytes=0-0"}
        async with session.get(url, **options) as answer:
            answer.raise_for_status()
            total = answer.headers.get("Content-Range", "/").rsplit("/", 1)[1]
            if answer.status == 200:
                total = answer.headers.get("Content-Length", "")
            return dict(answer.headers) | {"size": int(total) if total.isdigit() else None}

    return sync(fs.loop, head)


@contextmanager
def open_at(url: str, start: int, *, stop: int | None = None, version: str = "") -> Iterator[tuple[int, Any]]:
    """Open a file at byte `start`; yield (the byte it really begins at, file). A server without ranges begins at 0.

    Args:
        stop: the caller reads up to this byte at most.
        version: of the shard; if the server has another one by now, the file begins at 0.
    """
    if url.startswith("pipe:"):
        from webdataset.gopen import gopen

        with closing(gopen(url, "rb")) as file:
            yield 0, file
    elif url.startswith(("http://", "https://")):
        fs = _filesystem(url)
        headers = dict(fs.kwargs["headers"])
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
            if version.startswith('"'):
                headers["If-Range"] = version
        # Without `size` fsspec would request it; block_size=0 streams one request.
        with fs.open(url, "rb", block_size=0, size=1, headers=headers) as file:
            yield start if file.r.status == 206 else 0, file
    else:
        with _filesystem(url).open(_inside(url), "rb", block_size=BLOCK, cache_type="none") as file:
            file.seek(start)
            yield start, file


def read_range(shard: RemoteShard, offset: int, size: int) -> bytes:
    """Read bytes `offset .. offset + size` from the server, without the cache.

    Raises:
        Unavailable: they cannot be read.
    """

    def read() -> bytes:
        with open_at(shard.url, offset, stop=offset + size, version=shard.version) as (position, file):
            if position != offset:
                raise Unavailable(f"{shard.url}: the server sends no ranges")
            data = b""
            while len(data) < size and (more := file.read(size - len(data))):
                data += more
        if len(data) != size:
            raise ConnectionError(f"ended at byte {offset + len(data)} of {offset + size}")
        return data

    return retry(read, url=shard.url)


def read_small(url: str) -> bytes:
    """Read a whole file of a few MiB.

    Raises:
        Unavailable: it cannot be read.
    """

    # Retried on its own: if both requests fail now and then, one of the two might fail in every attempt.
    size = retry(lambda: _info(url).get("size"), url=url)

    def read() -> bytes:
        with open_at(url, 0) as (_, file):
            data = b"".join(iter(lambda: file.read(BLOCK), b""))
        if size is not None and len(data) != size:
            raise ConnectionError(f"ended at byte {len(data)} of {size}")
        return data

    return retry(read, url=url)


def read_if_there(url: str) -> bytes | None:
    """Like `read_small`, but return None if the file does not exist.

    Raises:
        Unavailable: it exists, or may exist, and cannot be read.
    """
    try:
        return read_small(url)
    except Unavailable as error:
        if is_missing(error.__cause__):
            return None
        raise
