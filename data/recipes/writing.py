"""Convert one part to a shard, its index and a report of what was kept and dropped; runs in a worker process.

A shard gets its name once it is complete, and its report is written after it. A part whose report matches the bytes of
its shard is finished and is not converted again.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.recipes.held_out import SHARED, WIDTH, choose_side, hash_images, shares_image
from data.recipes.record import BAD_ROW, IMAGE_MISSING, ODD_ROW, Dropped, Part, Record

UNREADABLE = "image unreadable"
TOO_LARGE = "image too large"
NOT_UNICODE = "text is not Unicode"
TRANSCODED = "image of another format: stored as png"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass
class Job:
    """A worker's task: picklable, and everything that the shard's bytes depend on."""

    source: str
    split: str
    number: int
    part: Part
    folder: Path
    tokenizer: tuple[str, ...]  # path, template and, if it is another than the default, image token
    val: float = 0.0  # share of the train split's records that are held out as val
    counts_faults: bool = True  # train and a held-out val read the same rows: one of them counts their faults
    held_out: tuple[str, str] | None = None  # val's images, which train must not contain: file and digest

    @property
    def is_held_out(self) -> bool:
        return self.split == "val" and self.val > 0

    @property
    def shard(self) -> Path:
        return self.folder / f"{self.split}-{self.number:06d}.tar"

    @property
    def report(self) -> Path:
        return self.folder / f"{self.split}-{self.number:06d}.json"


@functools.cache
def load_tokenizer(path: str, template: str, image_token: str = ""):
    from fastvlm.tokens import IMAGE_TOKEN, Tokenizer

    return Tokenizer(path, template=template, image_token=image_token or IMAGE_TOKEN)


def read_report(job: Job) -> dict | None:
    """Return the report of a finished part after verifying its shard; None if the part must be converted."""
    try:
        report = json.loads(job.report.read_text())
        if report["kept"] and digest(job.shard) != report["sha256"]:
            return None
        if report["without"] != (job.held_out or ("", ""))[1]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def do_part(job: Job) -> dict:
    """Write the shard of a part unless it exists, then index and check it.

    Returns:
        The report: kept, bytes, sha256, dropped (list of [id, reason]), notes (note -> count), ids (16 hex digits
        of each original id's hash), again (the shard existed); with val > 0 also seen (records of both sides),
        images (of val, 16 hex digits of each one's hash) and without (digest of the images that train left out).

    Raises:
        ValueError: the rows cannot be read, or the shard on disk differs from what was written.
        OSError: no space or no permission; no unfinished file of this part is left behind.
    """
    report = read_report(job)
    again = report is not None
    if report is None:
        report = write_part(job)
        # The report comes last: its existence means that the shard is complete.
        write_text(job.report, json.dumps(report, ensure_ascii=True) + "\n")
    if report["kept"]:
        index_part(job, report)
    return report | {"again": again}


def write_part(job: Job) -> dict:
    from fastvlm.data.shards import Shard

    dropped: list[list[str]] = []
    notes: dict[str, int] = {}
    ids: list[str] = []
    held_out: set[bytes] = set()
    seen = 0
    with Shard(job.shard) as shard:
        for item in convert(job):
            if isinstance(item, Dropped):
                if job.counts_faults:
                    dropped.append([str(item.id), item.reason])
                continue
            original = item.record.get("id")
            id = item.key if original in (None, "") else str(original)
            known = hash_images(item) if job.val else []
            if job.val:
                seen += 1
                if choose_side(item, known, job.val) != job.split:
                    continue
                if job.held_out and shares_image(known, job.held_out):
                    dropped.append([id, SHARED])
                    continue
            try:
                images, extensions, noted = check_images(item.images)
                json.dumps(item.record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                dropped.append([id, NOT_UNICODE])
                continue
            except TypeError:  # a date or bytes, from parquet
                dropped.append([id, BAD_ROW])
                continue
            except Fault as fault:
                dropped.append([id, str(fault)])
                continue
            shard.write(item.key, item.record, images, image_ext=extensions)
            if job.is_held_out:
                held_out.update(image[:WIDTH] for image in known)
            if original not in (None, ""):
                ids.append(hashlib.sha256(repr(original).encode()).hexdigest()[:16])
            for note in (*item.notes, *noted):
                notes[note] = notes.get(note, 0) + 1
        kept, size = shard.num_samples, 0
        shard.finish()
        if kept:
            size = os.path.getsize(shard.part)
            with open(shard.part, "rb") as file:
                os.fsync(file.fileno())
            shard.publish()
        else:
            job.shard.unlink(missing_ok=True)
        shard.discard()
    return {
        "kept": kept,
        "bytes": size,
        "sha256": digest(job.shard) if kept else "",
        "dropped": dropped,
        "notes": notes,
        "ids": "".join(ids),
        "seen": seen,
        "images": b"".join(sorted(held_out)).hex(),
        "without": (job.held_out or ("", ""))[1],
    }


def convert(job: Job) -> Iterator[Record | Dropped]:
    """Yield the recipe's records.

    Raises:
        ValueError: the recipe failed on an unexpected type; names the file and the rows.
    """
    recipe = importlib.import_module(f"data.recipes.{job.source}")
    try:
        yield from recipe.convert(job.part)
    except ODD_ROW as error:
        where = f"{job.part.path}: rows {job.part.start}..{job.part.stop}"
        raise ValueError(f"{where} are not of the layout of {job.source} ({type(error).__name__}: {error})") from error


class Fault(Exception):
    """Raised with the reason why a record is dropped."""


def check_images(images: list[bytes | Path]) -> tuple[list[bytes], list[str], list[str]]:
    """Return encoded files, their extensions and notes; reads every header and applies the index's size limits.

    Raises:
        Fault: an image is missing, unreadable or too large.
    """
    from PIL import Image

    from fastvlm.data.decode import MAX_BYTES, TooLarge, open_image

    files, extensions, notes = [], [], []
    for image in images:
        if isinstance(image, Path):
            image = read_file(image, MAX_BYTES)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
                opened = open_image(image)
            extension = EXTENSIONS.get(opened.format)
            if extension is None:
                image, extension = to_png(opened, image), "png"
                open_image(image)
                notes.append(TRANSCODED)
        except TooLarge:
            raise Fault(TOO_LARGE) from None
        except ValueError:
            raise Fault(UNREADABLE) from None
        files.append(image)
        extensions.append(extension)
    return files, extensions, notes


def read_file(path: Path, limit: int) -> bytes:
    """Read an image file.

    Raises:
        Fault: the file does not exist, may not be read or has more than `limit` bytes.
        OSError: another error, such as one of the disk, which may be gone in the next run.
    """
    try:
        if path.stat().st_size > limit:
            raise Fault(TOO_LARGE)
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):  # ValueError: a null byte
        raise Fault(IMAGE_MISSING) from None
    except PermissionError:
        raise Fault(UNREADABLE) from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise Fault(IMAGE_MISSING) from None
        raise


def to_png(opened, data: bytes) -> bytes:
    """Re-encode an image of another format as PNG, with the pixels that training would decode.

    Raises:
        ValueError: the image is broken.
    """
    from einops import rearrange
    from PIL import Image

    from fastvlm.data.decode import decode_pixels

    out = io.BytesIO()
    Image.fromarray(rearrange(decode_pixels(opened, data), "c h w -> h w c").numpy()).save(out, "png")
    return out.getvalue()


def index_part(job: Job, report: dict) -> None:
    """Index the shard unless it is indexed, and compare the file on disk with what was written.

    Raises:
        ValueError: the file differs from what was written, or holds a record that cannot be read.
        OSError: there is no room for the index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fastvlm.data.sidecar import FORMAT, build_index, sidecar

    def read() -> tuple[pa.Table | None, dict]:
        try:
            table = pq.read_table(sidecar(job.shard), columns=["fault"])
            return table, json.loads(table.schema.metadata[b"fastvlm"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None, {}

    tokenizer = load_tokenizer(*job.tokenizer)
    stat = job.shard.stat()
    wanted = [FORMAT, tokenizer.fingerprint, stat.st_size, stat.st_mtime_ns]
    table, header = read()
    if [header.get(k) for k in ("format", "tokenizer", "shard_size", "shard_mtime_ns")] != wanted:
        made = build_index(job.shard, tokenizer)
        if made != sidecar(job.shard):  # written elsewhere, because the shard fitted here but its index did not
            raise OSError(errno.ENOSPC, "no room for its index", str(job.shard))
        table, header = read()
        if table is None:
            raise ValueError(f"{job.shard}: its index cannot be read right after it was built")
    faults = [fault for fault in table["fault"].to_pylist() if fault]
    if header["broken"] or faults or len(table) != report["kept"]:
        what = header["broken"] or (faults or [f"{len(table)} samples where {report['kept']} were written"])[0]
        job.report.unlink(missing_ok=True)
        if digest(job.shard) == report["sha256"]:  # the bytes are as written, so another run would fail the same way
            raise ValueError(f"{job.part.path}: a row makes a sample that cannot be read ({what}); take that row out")
        raise ValueError(f"{job.shard} is not as it was written: {what}; run the same command again")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
