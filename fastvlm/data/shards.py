"""Shards: plain WebDataset tars, written reproducibly (byte for byte) and read at indexed offsets.

A sample is `<key>.json` with its images `<key>.<i>.<png|jpg|webp>` in the order of the record's image parts, and
optionally one dense label map per image, `<key>.<i>.labels.png`. img2dataset's shards (`jpg` + `txt` + `json`) are read
as documents of one image and its caption. In shards that others wrote, images may also be GIF, BMP, TIFF, PPM or AVIF,
and suffixes may be in capitals. Format: https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import re
import tarfile
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastvlm.data.encoded import EncodedImage
from fastvlm.data.listing import LISTING, check_folder, write_listing
from fastvlm.data.remote import RemoteShard, Unavailable, read_range
from fastvlm.data.shard_cache import Damaged, NoRoom, ShardCache

log = logging.getLogger(__name__)

KEY = re.compile(r"[a-z0-9_-]+")
IMAGE = re.compile(r"(?:(\d+)\.)?(?:png|jpe?g|webp|gif|bmp|tiff?|ppm|avif)")
NOT_READ = re.compile(r"(?:\d+\.)?(?:img|image|heic|heif|jp2|jxl|svg)")  # may be images, but cannot be read
LABEL_MAP = re.compile(r"(\d+)\.labels\.png")
# tarfile also raises these, for numbers in extended headers that are invalid or larger than any file.
BAD_HEADER = (tarfile.TarError, ValueError, KeyError, OverflowError, MemoryError)
STORES = (".lmdb", ".h5")  # other containers of samples: `stores.py`
RECENT = 100  # reads; a `ShardReader` closes a shard that none of them was from
# Names are split as in webdataset: the key ends at the first dot of the last path component.
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


@dataclass
class RawSample:
    """A sample as stored in its shard: nothing is decoded except the JSON."""

    key: str
    record: dict
    images: list[EncodedImage] = field(default_factory=list)
    label_maps: list[EncodedImage] = field(default_factory=list)


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, sorted by name.

    Raises:
        ValueError: one that `shards.json` names is missing.
    """
    found = sorted(p for p in folder.glob(f"{split}-*") if p.suffix in (".tar", *STORES))
    check_folder(folder, split, [f"{split}-*"], found)
    return found


@dataclass
class Span:
    """The location of a sample in its tar: bytes `offset .. offset + size` hold all its members with their headers."""

    key: str
    offset: int
    size: int
    members: list[tuple[str, int, int]]  # (suffix, offset of the data, size of the data)
    fault: str = ""  # why it cannot be read; "" if the scan found no fault


def count_images(record: dict) -> int:
    """Count the image parts of a record's `messages` or `document`."""
    contents = [m.get("content") for m in record["messages"]] if "messages" in record else [record.get("document")]
    return sum(part.get("type") == "image" for parts in contents if isinstance(parts, list) for part in parts)


def parse_sample(key: str, members: dict[str, bytes]) -> RawSample:
    """Assemble a sample from its members (suffix -> bytes).

    Raises:
        ValueError: no readable record, or the number of images or label maps differs from that of the image parts.
    """
    try:
        record = json.loads(members["json"]) if "json" in members else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}.json is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{key}.json is not an object")
    images, maps = sort_images(members)
    if "messages" not in record and "document" not in record:
        record = read_caption(key, members, record, len(images))
    try:
        expected = count_images(record)
    except (AttributeError, TypeError, KeyError):
        raise ValueError(f"{key}.json: `messages` or `document` is not a list of parts") from None
    if expected != len(images):
        raise ValueError(f"{key}: the record has {expected} image parts and the shard {len(images)} images")
    if maps and len(maps) != len(images):
        raise ValueError(f"{key}: {len(images)} images and {len(maps)} label maps")
    return RawSample(key, record, images, maps)


def sort_images(members: Mapping[str, EncodedImage]) -> tuple[list[EncodedImage], list[EncodedImage]]:
    """Return the images and the label maps of a sample, each in the order of the record's image parts."""
    ranks = sorted(rank for suffix in members if (rank := rank_member(suffix)) is not None)
    images, maps = ([members[s] for kind, _, s in ranks if kind == wanted] for wanted in (0, 1))
    return images, maps


@functools.cache
def rank_member(suffix: str) -> tuple[int, int, str] | None:
    """Return (0 for an image or 1 for a label map, its number, the suffix); None for other members."""
    if match := IMAGE.fullmatch(suffix):
        return 0, int(match[1] or 0), suffix
    if match := LABEL_MAP.fullmatch(suffix):
        return 1, int(match[1]), suffix
    return None


NSFW_LEVELS = {"UNLIKELY": 0, "UNSURE": 1, "NSFW": 2}  # LAION's labels


def read_caption(key: str, members: dict[str, bytes], fields: dict, num_images: int) -> dict:
    """Build a document from img2dataset's `jpg` + `txt` + `json`; the other columns of the JSON become its `meta`.

    Raises:
        ValueError: no caption in txt or json, an image that img2dataset failed to download, or one that cannot be read.
    """
    if "status" in fields and not num_images:
        raise ValueError(f"{key} has no image ({fields['status']})")
    if others := [suffix for suffix in members if NOT_READ.fullmatch(suffix)]:
        raise ValueError(f"{key} has no image that can be read: {key}.{others[0]} is of none of the formats known")
    text = members["txt"].decode("utf-8", errors="replace") if "txt" in members else fields.get("caption")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key} has no `messages`, no `document` and no caption in txt or json")
    parts = [*[{"type": "image"}] * num_images, {"type": "text", "text": text.strip()}]
    left_out = ("caption", "exif", "status", "error_message")
    meta = {name: value for name, value in fields.items() if name not in left_out and value is not None}
    if (level := NSFW_LEVELS.get(meta.get("NSFW"))) is not None:
        meta["nsfw_level"] = level  # filters compare numbers
    return {"document": parts} | ({"meta": meta} if meta else {})


class Shard:
    """Writer of one tar, which appears complete under its name when closed, or not at all.

    The same samples give the same bytes.

    Args:
        path: final name; the folder must exist.
        keys: keys written so far, if several shards share them; None: none.
    """

    def __init__(self, path: str | Path, *, keys: set[str] | None = None):
        self.path, self.num_samples = Path(path), 0
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self._keys = set() if keys is None else keys
        # GNU, not pax: a pax header may hold timestamps as floats. Every reader supports both.
        self._tar = tarfile.open(self.part, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._tar.offset

    def write(
        self,
        key: str,
        record: dict,
        images: Sequence[bytes] = (),
        label_maps: Sequence[bytes] | None = None,
        image_ext: str | Sequence[str] = "png",
    ) -> None:
        """Append a sample.

        Args:
            key: unique within the source, `[a-z0-9_-]+`.
            record: object with either `messages` or `document`.
            images: encoded files, one per image part of the record.
            label_maps: encoded PNGs, one per image; None: no label maps.
            image_ext: suffix of all images, or of each.

        Raises:
            ValueError: an invalid key or one that was written before, an invalid record, or counts that do not agree.
        """
        where = self.path.parent
        if not KEY.fullmatch(key):
            raise ValueError(f"{where}: key {key!r} must match [a-z0-9_-]+")
        if key in self._keys:
            raise ValueError(f"{where}: key {key!r} was written before; keys are unique within a source")
        if ("messages" in record) == ("document" in record):
            raise ValueError(f"{where}: {key} needs exactly one of `messages` and `document`")
        if count_images(record) != len(images):
            raise ValueError(f"{where}: {key} has {count_images(record)} image parts and {len(images)} images")
        if label_maps is not None and len(label_maps) != len(images):
            raise ValueError(f"{where}: {key} has {len(images)} images and {len(label_maps)} label maps")
        extensions = [image_ext] * len(images) if isinstance(image_ext, str) else image_ext
        self._add(f"{key}.json", json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode())
        for i, (image, extension) in enumerate(zip(images, extensions, strict=True)):
            self._add(f"{key}.{i}.{extension}", image)
            if label_maps is not None:
                self._add(f"{key}.{i}.labels.png", label_maps[i])
        self._keys.add(key)
        self.num_samples += 1

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the names empty: same bytes every time
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def finish(self) -> None:
        """Write the end of the archive; the file keeps its temporary name."""
        self._tar.close()

    def publish(self, path: str | Path | None = None) -> None:
        """Give the finished file its final name."""
        os.replace(self.part, path or self.path)

    def discard(self) -> None:
        """Delete the temporary file."""
        with contextlib.suppress(OSError):  # on a full disk, writing the last buffer fails again
            self._tar.fileobj.close()
        self.part.unlink(missing_ok=True)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, kind, *rest) -> None:
        try:
            if kind is None and self.part.exists():  # the caller has neither published nor discarded it
                self.finish()
                self.publish()
        finally:
            if self.part.exists():
                self.discard()


class ShardWriter:
    """Writer of one split of a source, as `<folder>/<split>-<00000>.tar`.

    It replaces the split: when it closes without an error, the shards appear together under their final names, and
    shards of an earlier run of the same split are deleted. The same samples give the same bytes.

    Args:
        folder: where the shards go; created if missing.
        split: train, val or test.
        max_samples: maximum number of samples per shard.
        max_bytes: a shard that has reached this size is closed, too.
    """

    def __init__(self, folder: str | Path, split: str, *, max_samples: int = 2000, max_bytes: int = 1 << 30):
        self.folder, self.split, self.max_samples, self.max_bytes = Path(folder), split, max_samples, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_samples = 0
        self._keys: set[str] = set()
        self._shards: list[Shard] = []

    def write(
        self,
        key: str,
        record: dict,
        images: Sequence[bytes] = (),
        label_maps: Sequence[bytes] | None = None,
        image_ext: str | Sequence[str] = "png",
    ) -> None:
        """Append a sample, in a new shard if the last one is full; see `Shard.write`."""
        shard = self._shards[-1] if self._shards else None
        if shard is None or shard.num_samples >= self.max_samples or shard.num_bytes >= self.max_bytes:
            if shard is not None:
                shard.finish()
            shard = Shard(self.folder / f"{self.split}-{len(self._shards):05d}.tar", keys=self._keys)
            self._shards.append(shard)
        shard.write(key, record, images, label_maps, image_ext)
        self.num_samples += 1

    def close(self) -> None:
        """Publish the shards under their final names, in place of those of an earlier run."""
        if self._shards:
            self._shards[-1].finish()
        for old in self.folder.glob(f"{self.split}-*.tar*"):
            old.unlink()
        for shard in self._shards:
            shard.publish()
        self._shards = []
        if (self.folder / LISTING).exists():
            write_listing(self.folder)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            return self.close()
        for shard in self._shards:
            shard.discard()


def as_text(name: str) -> str:
    """Return a name as valid UTF-8, with undecodable bytes and lone surrogates escaped."""
    return name.encode(errors="backslashreplace").decode()


def scan_shard(path: str | Path) -> tuple[list[Span], str]:
    """Find the samples of a tar in one pass over its headers.

    Returns:
        The complete samples in order, and what broke the tar ("" if it is sound). After a break, the sample that was
        being read may be incomplete and is left out.

    Raises:
        OSError: the file is missing or may not be read.
        ValueError: see `scan_store`.
    """
    if str(path).endswith(STORES):
        from fastvlm.data.stores import scan_store

        return scan_store(path)
    size = os.path.getsize(path)
    spans: list[Span] = []
    start, broken, end = 0, "", 0
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115
    except (*BAD_HEADER, EOFError) as error:
        return [], f"not a tar ({error}) at byte 0 of {size}"
    with tar:
        while True:
            try:
                info = tar.next()
            except BAD_HEADER as error:
                broken = f"{str(error) or 'bad header'} at byte {end} of {size}"
                break
            if info is None:
                break
            name = as_text(info.name)
            if info.isfile() and info.offset_data + info.size > size:
                broken = f"truncated inside {name} at byte {size}"
                break
            end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not info.isfile() or (match := MEMBER.fullmatch(name)) is None:
                continue
            key, suffix = match[1], match[2].lower()  # as webdataset does
            if not spans or spans[-1].key != key:
                start = info.offset
                spans.append(Span(key, start, 0, []))
            spans[-1].members.append((suffix, info.offset_data, info.size))
            spans[-1].size = info.offset_data + info.size - start
        if not broken:
            # tarfile stops silently at a bad header; only a block of zeros marks the end of an archive.
            tar.fileobj.seek(tar.offset)
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                broken = f"ends without an end-of-archive block at byte {size}"
            elif block.strip(b"\0"):
                broken = f"bad header at byte {tar.offset} of {size}"
    if broken and spans:
        spans.pop()
    return spans, broken


class ShardReader:
    """Reads spans of shards with `pread`, keeping a bounded number of files open.

    `pread` uses no file position, so forked workers may share the descriptors. A remote shard is read from its copy in
    the shard cache, or span by span from the server if the cache cannot hold it. The cache evicts nothing that is open,
    so a shard that has not been read for long is closed. One in use stays open: a cache too small for all that are in
    use would otherwise fetch them in turns.
    """

    def __init__(self, *, max_open: int = 32, cache: ShardCache | None = None):
        self.max_open = max_open
        self._cache = cache
        self._files: OrderedDict[str, int] = OrderedDict()
        self._recent: deque[str] = deque(maxlen=RECENT)  # what the last reads were from
        self._failed: dict[str, tuple[float, str]] = {}  # url -> (no attempt before this time, reason)
        self._direct: set[str] = set()  # URLs that are always read without the cache
        self._no_cache_until = 0.0

    def read(self, file: str | RemoteShard, offset: int, size: int) -> bytes:
        """Read bytes `offset .. offset + size` of a shard.

        Raises:
            OSError: the file is missing or unavailable.
            ValueError: it is shorter than that.
        """
        if isinstance(file, str) and file.endswith(STORES):
            from fastvlm.data.stores import read_span

            data = read_span(file, offset)
            if len(data) != size:
                raise ValueError(f"{file}: record {offset} has {len(data)} bytes, the index expects {size}")
            return data
        name = file if isinstance(file, str) else file.url
        self._recent.append(name)
        if (oldest := next(iter(self._files), name)) not in self._recent:
            os.close(self._files.pop(oldest))
        fd = self._files.get(name)
        if fd is None:
            fd = os.open(file, os.O_RDONLY) if isinstance(file, str) else self._open_remote(file)
            if fd is None:
                return self._read_direct(file, offset, size)
            if len(self._files) >= self.max_open:
                os.close(self._files.popitem(last=False)[1])
            self._files[name] = fd
        else:
            self._files.move_to_end(name)
        data = os.pread(fd, size, offset)
        if len(data) != size:
            raise ValueError(f"{name} ends at byte {offset + len(data)}, the index expects {offset + size}")
        return data

    def drop_damaged(self, shard: RemoteShard) -> bool:
        """Remove the cached copy that a shard is read from if it differs from what was indexed.

        A disk may lose data that it reported as written.

        Returns:
            Whether it was removed; the next read then fetches the shard anew.
        """
        fd = self._files.pop(shard.url, None)
        if fd is None:
            return False
        if not (wrong := shard.check(fd)):
            self._files[shard.url] = fd
            return False
        log.warning("%s: the copy in the cache is damaged (%s) and is fetched anew", shard.url, wrong)
        with contextlib.suppress(OSError):
            self.cache.remove(shard, fd)
        os.close(fd)
        return True

    @property
    def cache(self) -> ShardCache:
        """The shard cache, opened when it is first needed."""
        if self._cache is None:
            self._cache = ShardCache()
        return self._cache

    def _open_remote(self, shard: RemoteShard) -> int | None:
        """Return a descriptor of the cached copy; None if the shard must be read from the server."""
        now = time.monotonic()
        until, why = self._failed.get(shard.url, (0.0, ""))
        if now < until:
            raise Unavailable(why)
        if shard.url in self._direct or now < self._no_cache_until:
            return None
        try:
            return self.cache.open(shard)
        except NoRoom as error:
            self._no_cache_until = now + 60
            log.warning("%s; shards are read without the cache for a minute", error)
        except Damaged as error:
            self._direct.add(shard.url)
            log.warning("%s; its samples are read one by one", error)
        except Unavailable as error:
            self._remember(shard, error)
            raise
        return None

    def _read_direct(self, shard: RemoteShard, offset: int, size: int) -> bytes:
        try:
            return read_range(shard, offset, size)
        except Unavailable as error:
            self._remember(shard, error)
            raise

    def _remember(self, shard: RemoteShard, error: Unavailable) -> None:
        # Otherwise each of thousands of samples would wait for all retries.
        self._failed[shard.url] = (time.monotonic() + 60, str(error))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict:
        return {"max_open": self.max_open, "cache": self._cache}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __del__(self) -> None:
        self.close()
