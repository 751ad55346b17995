"""Sources stored in LMDB or HDF5 files instead of tars: `<split>-*.lmdb`, `<split>-*.h5`.

Both hold encoded image files and a table of records. A record is a JSON object

    {"key": "vqa-000017", "record": {"messages": [...]}, "members": {"0.jpg": <image>, "0.labels.png": <image>}}

whose members are named as in a tar (`shards.py`). <image> refers to an image file:

    LMDB   its key in the main database, key -> encoded file; the named database `records` maps 0, 1, ... (8 bytes,
           big-endian) to records. One file, not a folder. An existing LMDB of images only needs the records added.
    HDF5   its row in `/images`, a one-dimensional dataset of variable-length uint8; `/records` is one of
           variable-length strings.

Several records may share an image. Everything else is as with shards: the index beside the file (its `offset` is the
record's number), the checksum of every sample when it is read, the plan.

    python -m fastvlm.data.stores data/embedded/captions out=/big/captions format=lmdb    # or hdf5; every split
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastvlm.data.shards import ShardReader, Span, as_text, find_shards, parse_sample, scan_shard

SUFFIXES = {"lmdb": ".lmdb", "hdf5": ".h5"}
MAX_OPEN = 32
COMMIT_BYTES = 256 << 20  # LMDB holds what is written in memory until it is committed


class LmdbStore:
    """Reader of an LMDB file.

    Raises:
        OSError, ValueError: it is missing, broken or of another layout.
    """

    survives_fork = True  # without locks, an LMDB environment is a memory map of a file that nobody writes

    def __init__(self, path: str):
        import lmdb

        self.path, self._error = path, lmdb.Error
        with open(path, "rb") as file:  # OSError if it may not be read, which does not make it broken
            size = os.fstat(file.fileno()).st_size
        try:
            self._env = lmdb.open(path, subdir=False, readonly=True, lock=False, max_dbs=1)
            pages = self._env.info()["last_pgno"] + 1
            if pages * self._env.stat()["psize"] > size:  # reading on would kill the process (SIGBUS)
                raise ValueError(f"{path} is truncated: {size} bytes, {pages} pages")
            self._records = self._env.open_db(b"records", create=False)
            with self._env.begin() as transaction:
                self._count = transaction.stat(self._records)["entries"]
        except lmdb.Error as error:
            raise ValueError(f"{path} is no LMDB with a database `records` ({error})") from None

    def __len__(self) -> int:
        return self._count

    def record(self, number: int) -> bytes:
        """Return the JSON of a record."""
        with self._env.begin() as transaction:
            data = transaction.get(number.to_bytes(8, "big"), db=self._records)
        if data is None:
            raise ValueError(f"{self.path} has no record {number}")
        return data

    def image(self, name: str) -> bytes:
        """Return an encoded image by its key in the database."""
        try:
            with self._env.begin() as transaction:
                data = transaction.get(str(name).encode())
        except self._error as error:  # not a valid key: empty, or too long
            raise ValueError(f"{self.path}: image {name!r:.80}: {error}") from None
        if data is None:
            raise ValueError(f"{self.path} has no image {name!r}")
        return data

    def close(self) -> None:
        self._env.close()


class Hdf5Store:
    """Reader of an HDF5 file.

    Raises:
        OSError, ValueError: it is missing, broken or of another layout, or h5py is not installed.
    """

    survives_fork = False  # the library keeps state about open files

    def __init__(self, path: str):
        self.path = path
        with open(path, "rb"):  # OSError if it may not be read, which does not make it broken
            h5py = import_h5py(path)
        try:
            self._file = h5py.File(path, "r")
            self._records, self._images = self._file["records"], self._file["images"]
        except (OSError, KeyError) as error:
            raise ValueError(f"{path} is no HDF5 file with `records` and `images` ({error})") from None

    def __len__(self) -> int:
        return len(self._records)

    def record(self, number: int) -> bytes | str:
        """Return the JSON of a record."""
        data = self._records[number]
        return data if isinstance(data, bytes) else str(data)

    def image(self, name: int) -> bytes:
        """Return an encoded image by its row in `/images`."""
        if not isinstance(name, int) or not 0 <= name < len(self._images):
            raise ValueError(f"{self.path} has no image {name!r}; there are {len(self._images)}")
        return np.asarray(self._images[name], np.uint8).tobytes()

    def close(self) -> None:
        self._file.close()


def import_h5py(path: str | Path):
    """Import h5py, which is optional.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path} needs h5py; install the extra: pip install '.[hdf5]'") from None
    return h5py


# One handle per file and process: LMDB refuses to open a file twice.
_open: OrderedDict[str, tuple[tuple, LmdbStore | Hdf5Store]] = OrderedDict()


def open_store(path: str | Path) -> LmdbStore | Hdf5Store:
    """Return the open file, shared by all readers of this process.

    It is opened anew if it was replaced or, in a forked process, if its library needs that.
    """
    path = str(path)
    stat = os.stat(path)
    stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    held = _open.get(path)
    if held is not None:
        (opened, pid), store = held
        if opened == stamp and (pid == os.getpid() or store.survives_fork):
            _open.move_to_end(path)
            return store
        if pid == os.getpid() or store.survives_fork:
            store.close()  # but not the parent's HDF5 file, whose state is the parent's
        del _open[path]
    if len(_open) >= MAX_OPEN:
        _open.popitem(last=False)[1][1].close()
    store = (LmdbStore if path.endswith(".lmdb") else Hdf5Store)(path)
    _open[path] = (stamp, os.getpid()), store
    return store


def entry_of(store: LmdbStore | Hdf5Store, number: int) -> tuple[str, dict, dict]:
    """Return key and record of a sample, and the image of each member.

    Raises:
        ValueError: the record does not have this layout.
    """
    text = store.record(number)
    try:
        entry = json.loads(text)
        return as_text(str(entry["key"])), dict(entry["record"]), dict(entry.get("members") or {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{store.path}: record {number} is not {{key, record, members}} ({error!r})") from None


def members_of(store: LmdbStore | Hdf5Store, record: dict, named: dict) -> Iterator[tuple[str, bytes]]:
    """Yield the members of a record: its JSON first, then its images.

    Raises:
        ValueError: an image is missing.
    """
    yield "json", json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    for suffix, name in named.items():
        yield as_text(suffix).lower(), store.image(name)


def read_span(path: str | Path, number: int) -> bytes:
    """Return a sample's members, concatenated: what the index calls its span.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    store = open_store(path)
    _, record, named = entry_of(store, number)
    return b"".join(data for _, data in members_of(store, record, named))


def scan_store(path: str | Path) -> tuple[list[Span], str]:
    """Like `scan_shard`: return the samples, and what is broken. A span's offset is the record's number.

    Raises:
        OSError: the file is missing or may not be read.
        ValueError: h5py is not installed.
    """
    if SUFFIXES["hdf5"] == Path(path).suffix:
        import_h5py(path)  # raises if it is missing, which does not make the file broken
    try:
        store = open_store(path)
        count = len(store)
    except ValueError as error:
        return [], str(error)
    spans = []
    for number in range(count):
        key, place, listed, fault = f"{Path(path).name}-{number}", number, [], ""
        try:
            key, record, named = entry_of(store, number)
            for suffix, data in members_of(store, record, named):
                listed.append((suffix, place, len(data)))
                place += len(data)
        except (OSError, ValueError) as error:
            place, listed, fault = number, [], str(error)
        spans.append(Span(key, number, place - number, listed, fault))
    return spans, ""


# -- packing ----------------------------------------------------------------------------------------------------------


def read_shards(shards: list[Path]) -> Iterator[tuple[str, dict, dict[str, bytes]]]:
    """Yield (key, record, image members) of every sample of tars.

    Raises:
        ValueError: a broken tar or sample.
    """
    reader = ShardReader()
    for shard in shards:
        spans, broken = scan_shard(shard)
        if broken:
            raise ValueError(f"{shard}: {broken}; write the shard again")
        for span in spans:
            data = reader.read(str(shard), span.offset, span.size)
            members = {suffix: data[o - span.offset : o - span.offset + n] for suffix, o, n in span.members}
            record = parse_sample(span.key, members).record
            yield span.key, record, {s: d for s, d in members.items() if s not in ("json", "txt")}


def pack(folder: str | Path, split: str, *, out: str | Path, format: str) -> Path:
    """Write a split's shards as one store, `<out>/<split>-00000.<lmdb|h5>`; equal images are stored once.

    Raises:
        ValueError: no shards, a missing or broken one, an unknown format, h5py missing, or `out` has shards of this
            split already.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format={format} is not one of {', '.join(SUFFIXES)}")
    folder, out = Path(folder), Path(out)
    shards = [shard for shard in find_shards(folder, split) if shard.suffix == ".tar"]
    if not shards:
        raise ValueError(f"{folder}: no shards {split}-*.tar")
    path = out / f"{split}-00000{SUFFIXES[format]}"
    if others := [p for p in out.glob(f"{split}-*") if p.suffix in (".tar", *SUFFIXES.values()) and p != path]:
        raise ValueError(f"{out} has {others[0].name}: the split would be there twice; set out=<another folder>")
    if format == "hdf5":
        import_h5py(path)
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write = {"lmdb": write_lmdb, "hdf5": write_hdf5}[format]
        write(part, read_shards(shards), sum(s.stat().st_size for s in shards))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_lmdb(path: Path, samples: Iterator[tuple[str, dict, dict[str, bytes]]], size: int) -> None:
    """Write samples to a new LMDB file. `size`: total bytes of the shards they come from."""
    import lmdb

    # Only an upper limit. Twice the bytes, because small values leave much of their pages empty.
    env = lmdb.open(str(path), subdir=False, lock=False, map_size=2 * size + (1 << 28), max_dbs=1)
    with contextlib.closing(env):
        records, numbered, held = env.open_db(b"records"), enumerate(samples), COMMIT_BYTES
        while held >= COMMIT_BYTES:
            held = 0
            with env.begin(write=True) as transaction:
                for number, (key, record, images) in numbered:
                    members = {}
                    for suffix, data in images.items():
                        members[suffix] = f"{hashlib.sha256(data).hexdigest()[:32]}.{suffix.rsplit('.', 1)[-1]}"
                        transaction.put(members[suffix].encode(), data, overwrite=False)
                    entry = json.dumps({"key": key, "record": record, "members": members}, ensure_ascii=False)
                    transaction.put(number.to_bytes(8, "big"), entry.encode(), db=records, append=True)
                    held += len(entry) + sum(map(len, images.values()))
                    if held >= COMMIT_BYTES:
                        break
        env.sync(True)


def write_hdf5(path: Path, samples: Iterator[tuple[str, dict, dict[str, bytes]]], size: int) -> None:
    """Write samples to a new HDF5 file; `size` is unused."""
    h5py = import_h5py(path)
    with h5py.File(path, "w") as file:
        grow = {"shape": (0,), "maxshape": (None,), "chunks": (256,)}
        images = file.create_dataset("images", dtype=h5py.vlen_dtype(np.uint8), **grow)
        records = file.create_dataset("records", dtype=h5py.string_dtype(), **grow)
        rows: dict[bytes, int] = {}
        for number, (key, record, found) in enumerate(samples):
            members = {}
            for suffix, data in found.items():
                digest = hashlib.sha256(data).digest()
                if digest not in rows:
                    rows[digest] = len(rows)
                    images.resize(len(rows), axis=0)
                    images[len(rows) - 1] = np.frombuffer(data, np.uint8)
                members[suffix] = rows[digest]
            records.resize(number + 1, axis=0)
            records[number] = json.dumps({"key": key, "record": record, "members": members}, ensure_ascii=False)


def main() -> None:
    usage = "usage: python -m fastvlm.data.stores <folder of shards> out=<folder> format=<lmdb|hdf5> [split=<name>]"
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:] if "=" in argument)
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    if len(folders) != 1 or not {"out", "format"} <= options.keys() <= {"out", "format", "split"}:
        sys.exit(f"error: {usage}")
    folder = Path(folders[0])
    splits = (
        [options["split"]] if "split" in options else sorted({p.name.split("-")[0] for p in folder.glob("*-*.tar")})
    )
    try:
        if not splits:
            raise ValueError(f"{folder}: no shards <split>-*.tar")
        for split in splits:
            path = pack(folder, split, out=options["out"], format=options["format"])
            print(f"{path}: {len(open_store(path)):,} samples, {path.stat().st_size / 1e6:.1f} MB")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
