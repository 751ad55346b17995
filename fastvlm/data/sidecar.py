"""The index of one shard: `<shard>.tar.idx.parquet` beside it, one row per sample.

Its metadata holds the shard's size and checksum, the tokenizer's fingerprint and the format's version, so that an index
that does not fit is recognised. The index of a remote shard, or of one in a folder that cannot be written, is kept in
the cache folder; so is a second tokenizer's, so that runs with either may read the shards at the same time.

If images make up most of the shard, the index also holds the samples' token ids (`kept_texts.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastvlm.data.conversation import Text, lay_out, tokenise
from fastvlm.data.decode import measure_image
from fastvlm.data.kept_texts import KeptTexts
from fastvlm.data.remote import RemoteShard, Unavailable, beside, read_small
from fastvlm.data.shard_cache import UNWRITABLE, ShardCache, cache_folder
from fastvlm.data.shards import RawSample, ShardReader, Span, as_text, parse_sample, scan_shard
from fastvlm.tokens import IGNORE_INDEX, Tokenizer

FORMAT = 4
PARALLEL_BYTES = 32 << 20  # fewer bytes are indexed faster by one process
SAY_EVERY = 5  # seconds between progress lines
MEMBER = pa.struct([("suffix", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the sample's span in the tar, bytes; in a store the record's number
        ("size", pa.int64()),
        ("members", pa.list_(MEMBER)),
        ("num_images", pa.int32()),
        ("image_width", pa.list_(pa.int32())),  # pixels, EXIF orientation applied
        ("image_height", pa.list_(pa.int32())),
        ("text_tokens", pa.int32()),  # without image slots
        ("answer_tokens", pa.int32()),  # learned tokens
        ("type", pa.string()),
        ("numbers", pa.map_(pa.string(), pa.float64())),  # of the record's meta: ratings, similarity, ...
        ("crc32", pa.uint32()),  # of the span
        ("fault", pa.string()),  # why the sample cannot be read; "" for a sound one
    ]
)


def sidecar(shard: str | Path) -> Path:
    """Return the path of a shard's index."""
    return Path(f"{shard}.idx.parquet")


def checksum(offset: Sequence[int], size: Sequence[int], crc32: Sequence[int]) -> str:
    """Return a SHA-256 over offset, size and CRC-32 of every span: content without the modification time."""
    columns = [np.array(c, dtype="<i8").tobytes() for c in (offset, size, crc32)]
    return hashlib.sha256(b"".join(columns)).hexdigest()


def describe_sample(raw: RawSample, tokenizer: Tokenizer) -> tuple[dict, Text]:
    """Return the columns that depend on a sample's content, and its text.

    Raises:
        ValueError: the record or an image's header cannot be read.
    """
    sizes = []
    for i, image in enumerate(raw.images):
        try:
            sizes.append(measure_image(image))
        except ValueError as error:
            raise ValueError(f"image {i} cannot be opened: {error}") from None
    # One slot per image, not zero: text after an image is then not the first token, which is never learned.
    text = tokenise(raw.record, tokenizer)
    ids, labels, num_images, _ = lay_out(text, tokenizer, tokens_per_image=1)
    meta = raw.record.get("meta") or {}
    kind = meta.get("type") or ",".join(meta.get("types") or ())
    described = {
        "num_images": num_images,
        "image_width": [w for w, _ in sizes],
        "image_height": [h for _, h in sizes],
        "text_tokens": len(ids) - num_images,
        "answer_tokens": int((labels != IGNORE_INDEX).sum()),
        "type": as_text(str(kind)),
        "numbers": sorted(numbers_of(meta).items()),
        "fault": "",
    }
    return described, text


def numbers_of(meta: dict) -> dict[str, float]:
    """Return what filters can use: numbers in the meta except ids; of `ratings` (name -> one per turn), the lowest."""
    lowest = {name: [r for r in turns or () if r is not None] for name, turns in (meta.get("ratings") or {}).items()}
    numbers = {name: min(turns) for name, turns in lowest.items() if turns}
    numbers |= {name: value for name, value in meta.items() if not name.endswith("id")}
    found = {as_text(n): v for n, v in numbers.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    try:
        return {name: float(value) for name, value in found.items()}
    except OverflowError:
        raise ValueError("a number of its meta is larger than a float") from None


def read_span(shard: str | Path, span: Span, reader: ShardReader) -> bytes:
    """Read a sample's bytes; b"" if it is known to be unreadable."""
    return b"" if span.fault else reader.read(str(shard), span.offset, span.size)


def build_index(shard: str | Path, tokenizer: Tokenizer, *, out: Path | None = None) -> Path:
    """Read a shard once and write its sidecar; return the sidecar's path.

    A broken tar is indexed up to the break, which the header describes. A sample whose record or image cannot be read
    keeps its row, with the fault named, and no plan uses it. If the folder cannot be written, the sidecar goes into the
    cache folder.

    Args:
        out: write it there and nowhere else.
    """
    shard = Path(shard)
    stat = shard.stat()
    spans, broken = scan_shard(shard)
    rows, reader = [], ShardReader()
    texts = KeptTexts(tokenizer, shard_size=stat.st_size)
    for span in spans:
        data = read_span(shard, span, reader)
        members = {suffix: data[o - span.offset : o - span.offset + n] for suffix, o, n in span.members}
        row = {
            "key": span.key,
            "offset": span.offset,
            "size": span.size,
            "members": [{"suffix": s, "offset": o, "size": n} for s, o, n in span.members],
            "crc32": zlib.crc32(data),
        }
        text = None
        try:
            if span.fault:
                raise ValueError(span.fault)
            described, text = describe_sample(parse_sample(span.key, members), tokenizer)
            row |= described
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            nothing = {"num_images": 0, "image_width": [], "image_height": [], "text_tokens": 0, "answer_tokens": 0}
            row |= nothing | {"type": "", "numbers": [], "fault": as_text(f"{span.key}: {error}"[:300])}
        rows.append(row)
        texts.add(text)
    reader.close()
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    columns = [table[c].to_pylist() for c in ("offset", "size", "crc32")]
    header = {
        "format": FORMAT,
        "shard_size": stat.st_size,
        "shard_mtime_ns": stat.st_mtime_ns,
        "checksum": checksum(*columns),
        "tokenizer": tokenizer.fingerprint,
        "broken": broken,
        "suffixes": sorted({suffix for span in spans for suffix, _, _ in span.members}),
        "texts": texts.key,
    }
    for name, column in texts.columns().items():
        table = table.append_column(name, column)
    if out is not None:
        return write_sidecar(out, table, header)
    try:
        return write_sidecar(sidecar(shard), table, header)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return write_sidecar(cached_sidecar(shard, tokenizer.fingerprint), table, header)


def write_sidecar(path: Path, table: pa.Table, header: dict) -> Path:
    """Write a table and its metadata; the file appears complete, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        table = table.replace_schema_metadata({"fastvlm": json.dumps(header)})
        pq.write_table(table, part, compression="zstd", write_page_checksum=True)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    return path


def cached_sidecar(shard: Path | RemoteShard, fingerprint: str) -> Path:
    """Return the path in the cache folder of the index of a shard whose own folder cannot hold it."""
    remote = isinstance(shard, RemoteShard)
    digest = shard.digest if remote else hashlib.sha256(bytes(shard.absolute())).hexdigest()[:20]
    return cache_folder() / "index" / f"{digest}-{fingerprint}-{shard.name}.idx.parquet"


def unwritable(error: OSError) -> str:
    return f"{cache_folder()}: {error.strerror or error}; indexes of remote shards are kept there: set FASTVLM_CACHE"


@dataclass
class Sidecar:
    """The index of one shard, found to fit; its columns stay in the file until they are needed."""

    path: Path
    header: dict
    num_samples: int


def open_sidecar(shard: Path | RemoteShard, fingerprint: str) -> tuple[Sidecar | None, str]:
    """Return the sidecar of a shard, from beside it or the cache folder; or None and why none fits.

    This is cheap: size and modification time are compared. Only if the time differs (a copy, a checkout) are the spans'
    checksums read; if they agree, the new time is recorded, beside the shard or in the cache folder. A shard that was
    broken is checked every time: it may have been repaired, and a restored copy has the size and time that it had
    before.
    """
    kept = cached_sidecar(shard, fingerprint)
    if isinstance(shard, RemoteShard):
        found, reason = read_sidecar(kept, shard, fingerprint)
        if found is None and not shard.url.startswith("pipe:"):
            try:
                data = read_small(beside(shard.url, f"{shard.name}.idx.parquet"))
            except Unavailable:
                return None, "missing"
            fetched = kept.with_name(f".{kept.name}.{os.getpid()}")
            try:
                fetched.parent.mkdir(parents=True, exist_ok=True)
                fetched.write_bytes(data)
                found, reason = read_sidecar(fetched, shard, fingerprint)
                if found is not None:
                    os.replace(fetched, kept)
                    found.path = kept
            except OSError as error:
                raise ValueError(unwritable(error)) from None
            finally:
                with contextlib.suppress(OSError):
                    fetched.unlink(missing_ok=True)
        return found, reason
    found, reason = read_sidecar(sidecar(shard), shard, fingerprint)
    if found is None and kept.exists():
        found, _ = read_sidecar(kept, shard, fingerprint)
    return found, reason if found is None else ""


def read_sidecar(path: Path, shard: Path | RemoteShard, fingerprint: str) -> tuple[Sidecar | None, str]:
    """Return the sidecar at `path` if it fits the shard and the tokenizer; otherwise None and why not."""
    if not path.exists():
        return None, "missing"
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        header = json.loads(schema.metadata[b"fastvlm"])
        if header.get("format") != FORMAT or schema.names[: len(SCHEMA)] != SCHEMA.names:
            return None, f"of format {header.get('format')}, this version writes {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return None, f"unreadable ({str(error).splitlines()[0]})"
    if header["tokenizer"] != fingerprint:
        return None, f"made with tokenizer {header['tokenizer']}, this one is {fingerprint}"
    stat = shard.stat() if isinstance(shard, Path) else None
    size = stat.st_size if stat else shard.size
    if size is not None and header["shard_size"] != size:
        return None, f"of a shard of {header['shard_size']} bytes, it has {size}"
    moved = stat is not None and header["shard_mtime_ns"] != stat.st_mtime_ns
    kept = cached_sidecar(shard, fingerprint)
    if moved and path != kept and (found := read_sidecar(kept, shard, fingerprint)[0]):
        return found, ""
    if moved or (stat and header["broken"]):
        # Scan the headers, too: a sample that was appended is in no span of the old index.
        spans, broken = scan_shard(shard)
        if bool(broken) != bool(header["broken"]) or len(spans) != file.metadata.num_rows:
            return None, f"of other content ({header['broken'] or 'samples'})"
    if moved:
        reader = ShardReader()
        offset, size = [span.offset for span in spans], [span.size for span in spans]
        crc32 = [zlib.crc32(read_span(shard, span, reader)) for span in spans]
        if checksum(offset, size, crc32) != header["checksum"]:
            return None, "of other content (checksum)"
        header["shard_mtime_ns"] = stat.st_mtime_ns
        for place in (path, kept):  # the folder may be read-only
            with contextlib.suppress(OSError):
                write_sidecar(place, pq.read_table(path), header)
                break
    return Sidecar(path, header, file.metadata.num_rows), ""


def is_damaged(path: Path) -> bool:
    """Return whether some columns of an index cannot be read; a sound header does not exclude that."""
    try:
        pq.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pa.ArrowException):
        return True
    return False


def holds_another(shard: Path) -> bool:
    """Return whether the index beside a shard fits it, whatever tokenizer it was made with."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        header = json.loads(pq.read_schema(sidecar(shard)).metadata[b"fastvlm"])
        return read_sidecar(sidecar(shard), shard, header["tokenizer"])[0] is not None
    return False


def build_missing(shard: Path | RemoteShard, tokenizer: Tokenizer, *, replace: bool = False) -> None:
    """Build a shard's index; a remote shard is brought into the cache for that.

    Args:
        replace: replace the index beside the shard even if it fits another tokenizer.

    Raises:
        ValueError: a remote shard cannot be fetched, or its index not written.
    """
    if isinstance(shard, Path):
        if not replace and holds_another(shard):
            with contextlib.suppress(OSError):
                build_index(shard, tokenizer, out=cached_sidecar(shard, tokenizer.fingerprint))
                return
        build_index(shard, tokenizer)
        return
    cache = ShardCache()
    try:
        fd = cache.open(shard)
    except OSError as error:
        raise ValueError(f"{error}; its index cannot be built (a sidecar beside it would do)") from None
    try:
        build_index(cache.path(shard), tokenizer, out=cached_sidecar(shard, tokenizer.fingerprint))
    except OSError as error:
        raise ValueError(unwritable(error)) from None
    finally:
        os.close(fd)


def build_all(shards: Sequence[Path | RemoteShard], tokenizer: Tokenizer, *, label: str, replace: bool = False) -> None:
    """Build many indexes, in as many processes as there are cores, printing progress now and then.

    Args:
        label: begins the lines about progress.
        replace: see `build_missing`.
    """
    sizes = [s.size or 0 if isinstance(s, RemoteShard) else s.stat().st_size for s in shards]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = functools.partial(build_missing, tokenizer=tokenizer, replace=replace)
    started = said = time.monotonic()
    with contextlib.ExitStack() as stack:
        done: Iterable = map(work, shards)
        if len(shards) > 1 and cores > 1 and sum(sizes) > PARALLEL_BYTES:
            pool = stack.enter_context(multiprocessing.get_context("fork").Pool(min(cores, len(shards))))
            done = pool.imap(work, shards)
        for count, _ in enumerate(done, start=1):
            now = time.monotonic()
            if now - said > SAY_EVERY or (count == len(shards) and now - started > SAY_EVERY):
                print(f"{label}: index of {count} of {len(shards)} shards built", file=sys.stderr, flush=True)
                said = now
