"""Shards wherever they lie: which shards a source's path names, and their bytes, with retries.

Everything goes through fsspec (`http(s)://`, `s3://`, `gs://`, `hf://` and whatever else is registered there);
`pipe:` commands through webdataset's opener. A folder behind HTTP has no listing of its own: `shards.json` beside the
shards says what is there, or the path is a brace pattern.
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

from fastvlm.data.listing import LISTING, SPLIT, check_listed, listed

ATTEMPTS = 5  # failures in a row, without a byte gained, before a file is given up
BACKOFF = 0.5  # seconds before the second attempt; doubled for each one after
TIMEOUT = 60  # seconds without a byte
BLOCK = 8 << 20  # bytes asked for at a time where each request names its range
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://|pipe:")
# Names under which filesystems tell a file's content, the surest first, then its time.
VERSIONS = ("versionid", "etag", "md5hash", "crc32c", "xet_hash", "blob_id", "oid")
VERSIONS += ("last-modified", "lastmodified", "last_modified", "last_commit", "updated", "mtime", "modified", "created")


class Unavailable(OSError):
    """A remote file cannot be had: it is not there, may not be read, or all attempts failed."""


@dataclass(frozen=True)
class RemoteShard:
    """A shard behind a URL, as it was when the source was opened."""

    url: str
    size: int | None  # bytes; None where the other side does not say
    version: str = ""  # ETag, hash or time of the last change, where there is one
    # (offset, size, CRC-32) of its samples, once its index is open
    spans: tuple[np.ndarray, np.ndarray, np.ndarray] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return file_name(self.url)

    @property
    def digest(self) -> str:
        """Another content, another digest, as far as the other side tells."""
        return hashlib.sha256(f"{self.url}\0{self.size}\0{self.version}".encode()).hexdigest()[:20]

    def check(self, fd: int) -> str:
        """Compare a local copy with the index; returns what is wrong with it, "" for nothing."""
        if self.spans is None:
            return ""
        spans = zip(*(column.tolist() for column in self.spans))
        wrong = sum(zlib.crc32(os.pread(fd, size, offset)) != crc32 for offset, size, crc32 in spans)
        return f"{wrong} of {len(self.spans[0])} samples are not those of its index (CRC-32)" if wrong else ""


def is_remote(path: Any) -> bool:
    return isinstance(path, str) and SCHEME.match(path) is not None and not path.startswith(("file://", "local://"))


def file_name(location: str) -> str:
    """Last component of a path or URL; of a `pipe:` command the last word that names a tar."""
    if location.startswith("pipe:"):
        found = re.findall(r"[^/\s'\"]+\.tar\b", location)
        return found[-1] if found else hashlib.sha256(location.encode()).hexdigest()[:12] + ".tar"
    return location.split("?")[0].rstrip("/").rsplit("/", 1)[-1]


def beside(url: str, name: str) -> str:
    """URL of another file in the folder of a file; a query (a signature) belongs to the file alone and goes."""
    return f"{url.split('?')[0].rsplit('/', 1)[0]}/{name}"


def locate_shards(path: str | Path | Sequence[str], split: str, names: str | None = None) -> list[Path | RemoteShard]:
    """The shards of a split: by name in a folder elsewhere, in the order given in a list or brace pattern.

    In a list or pattern a name that says no split (`00000.tar`, as img2dataset writes them) is of `train`.

    Args:
        names: of a folder, those that this pattern or range names, in place of `<split>-*.tar`.

    Raises:
        ValueError: the path cannot be listed, a shard it names cannot be seen, or `names` beside a path that names
            shards itself.
    """
    given = [str(p) for p in path] if isinstance(path, (list, tuple)) else [str(path)]
    given = [re.sub(r"^(file|local)://", "", p) for p in given]
    one = given[0] if len(given) == 1 else ""
    named = isinstance(path, (list, tuple)) or one.endswith(".tar") or one.startswith("pipe:")
    if named and names is not None:
        more = f" and {len(given) - 1} more" if len(given) > 1 else ""
        raise ValueError(f"{given[0]}{more}: shards={names} is for a folder, and this path names its own; drop shards=")
    is_file = named or "{" in one
    if names is not None and "*" not in names:
        given = [f"{one.rstrip('/')}/{names}"]
    elif is_remote(one) and not is_file:
        return list_folder(one, split, names or f"{split}-*.tar")
    import braceexpand

    try:
        found = [url for pattern in given for url in braceexpand.braceexpand(pattern)]
    except braceexpand.UnbalancedBracesError:
        raise ValueError(f"{path}: unbalanced braces; a pattern is like train-{{00000..00099}}.tar") from None
    says = lambda url: match[1] if (match := SPLIT.match(file_name(url))) else "train"
    return describe([url for url in found if says(url) == split])


def list_folder(url: str, split: str, pattern: str) -> list[RemoteShard]:
    """Shards `<url>/<pattern>`, by name; behind HTTP those that the listing has of the split.

    Raises:
        ValueError: the folder cannot be listed, or a shard that its listing names is not there.
    """
    url = url.rstrip("/")
    where = f"{url}/{LISTING}"
    if not url.startswith(("http://", "https://")):
        try:
            found = retry(lambda: _filesystem(url).glob(f"{_inside(url)}/{pattern}", detail=True), url=url)
            listing = read_if_there(where)
        except Unavailable as error:
            raise ValueError(f"{error}; check the address and the credentials") from None
        root = url.split("://")[0] + "://"
        shards = [RemoteShard(root + path.lstrip("/"), info["size"], version_of(info)) for path, info in found.items()]
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
    """Size and version of every remote one, many at a time.

    Raises:
        ValueError: one that is not there, by name.
    """

    def look(location: str) -> Path | RemoteShard:
        if not is_remote(location):
            if not Path(location).is_file():
                raise ValueError(f"{location}: no such shard; put it back, or leave it out of the source's path")
            return Path(location)
        if location.startswith("pipe:"):
            return RemoteShard(location, None)
        try:
            info = retry(lambda: _info(location), url=location)
        except Unavailable as error:
            raise ValueError(f"{error}; put it back, or leave it out of the source's path") from None
        return RemoteShard(location, info.get("size"), version_of(info))

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(look, locations))


def version_of(info: dict) -> str:
    """What a filesystem says about a file's content: a version or hash where it has one, else a time."""
    lower = {key.lower(): value for key, value in info.items()}
    for key in VERSIONS:
        if lower.get(key) not in (None, "", "null"):
            return str(lower[key])
    return ""


def retry(action: Callable[[], Any], *, url: str) -> Any:
    """Do something with a remote file until it works.

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
    """Raise Unavailable when a failure is for good or one too many; else wait."""
    if isinstance(error, Unavailable):
        raise error
    if is_permanent(error):
        raise Unavailable(f"{url}: {reason(error)}") from error
    if failures >= ATTEMPTS:
        raise Unavailable(f"{url}: {reason(error)}; gave up after {failures} attempts") from error
    time.sleep(BACKOFF * 2 ** (failures - 1) * random.uniform(0.5, 1.5))  # noqa: S311


def status_of(error: BaseException) -> int | None:
    """HTTP status in an error of aiohttp, Hugging Face, botocore or gcsfs."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # aiohttp's `code` is its own and says 400 for a body that was cut.
    code = getattr(error, "code", None) if type(error).__module__.startswith("gcsfs") else None
    for value in (getattr(error, "status", None), getattr(response, "status_code", response), code):
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return None


def is_permanent(error: Exception) -> bool:
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 416, 425, 429)
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, TypeError)
    return isinstance(error, (*kinds, NotImplementedError)) or "Credentials" in type(error).__name__


def is_missing(error: BaseException | None) -> bool:
    return isinstance(error, FileNotFoundError) or (error is not None and status_of(error) == 404)


def reason(error: Exception) -> str:
    status, text = status_of(error), (str(error).splitlines() or [""])[0]
    if is_missing(error):
        return "not found"
    return f"{getattr(error, 'message', '') or text or type(error).__name__}"[:200] + (f" ({status})" if status else "")


def _filesystem(url: str):
    """fsspec's instance; asked for anew each time, since instances do not survive a fork and fsspec keeps them."""
    import fsspec

    protocol, options = url.split("://")[0], {}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        options["client_kwargs"] = {"timeout": timeout}
        options["headers"] = {"Accept-Encoding": "identity"}  # else a server may count compressed bytes
    elif protocol in ("s3", "s3a"):
        own = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT} | own
    # What stands in its cache of listings may be older than the files.
    return fsspec.filesystem(protocol, use_listings_cache=False, **options)


def _inside(url: str) -> str:
    return _filesystem(url)._strip_protocol(url)


def _info(url: str) -> dict:
    fs = _filesystem(url)
    if not url.startswith(("http://", "https://")):
        return fs.info(url)
    # fsspec's own `info` takes every failure for a missing file.
    from fsspec.asyn import sync

    async def head() -> dict:
        session = await fs.set_session()
        options = {"headers": fs.kwargs["headers"], "allow_redirects": True}
        async with session.head(url, **options) as answer:
            if answer.status < 400 and "Content-Length" in answer.headers:
                return dict(answer.headers) | {"size": int(answer.headers["Content-Length"])}
            if answer.status not in (403, 405, 501) and answer.status >= 400:
                answer.raise_for_status()
        # A server that answers no HEAD (a signed URL is good for GET alone).
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
    """A file from byte `start` on, as (the byte it really begins at, file). A server without ranges begins at 0.

    Args:
        stop: no more than up to this byte will be read.
        version: of the shard; where another is there by now, the file begins at 0.
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
        # A size, else fsspec asks for one; block_size=0 is one request and a stream.
        with fs.open(url, "rb", block_size=0, size=1, headers=headers) as file:
            yield start if file.r.status == 206 else 0, file
    else:
        with _filesystem(url).open(_inside(url), "rb", block_size=BLOCK, cache_type="none") as file:
            file.seek(start)
            yield start, file


def read_range(shard: RemoteShard, offset: int, size: int) -> bytes:
    """Bytes `offset .. offset + size` straight from the other side.

    Raises:
        Unavailable: they cannot be had.
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
    """A whole file of some MiB.

    Raises:
        Unavailable: it cannot be had.
    """

    # By itself: of two requests that fail now and then one may always be the one that does.
    size = retry(lambda: _info(url).get("size"), url=url)

    def read() -> bytes:
        with open_at(url, 0) as (_, file):
            data = b"".join(iter(lambda: file.read(BLOCK), b""))
        if size is not None and len(data) != size:
            raise ConnectionError(f"ended at byte {len(data)} of {size}")
        return data

    return retry(read, url=url)


def read_if_there(url: str) -> bytes | None:
    """As `read_small`; None where there is no such file.

    Raises:
        Unavailable: it is there, or may be, and cannot be had.
    """
    try:
        return read_small(url)
    except Unavailable as error:
        if is_missing(error.__cause__):
            return None
        raise
