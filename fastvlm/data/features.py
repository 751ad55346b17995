"""Outputs of a frozen encoder, written once and then read instead of images.

`<cache>/features/<key>/` is one store. Its key is the hash of everything the outputs depend on except the image:
encoder weights and configuration, image size and transform, precision, code and library versions. An entry's key is the
SHA-256 of the encoded image file as it was read, so stale entries are never found. A store holds

    store.json             what the key was made of, for people
    <hash>.safetensors     chunks: features (V, N, D), keys uint8 (n, 32), views int32 (n): image i has views[i] rows;
                           sums int64 (n): CRC-32 of each image's features
    plans/<hash>.json      chunks that hold every image of a plan, so that it is not read again to find out

Chunks appear by rename and never change, so readers need no lock, ranks write in parallel and network disks work. LMDB
allows one writer at a time, needs to know its largest size, cannot be opened twice in a process, and takes 1 to 12 %
more space. In two measurements it read small entries from disk 1.5 and 2.8 times as fast (18 kB; as fast at 400 kB) and
wrote 0.9 to 2.3 times as fast (`benchmarks/features.py stores`). Neither matters here: an encoder yields features
far more slowly than either store writes them, and a training step takes far longer than a read.

    python -m fastvlm.data.features                  # what is there
    python -m fastvlm.data.features delete=<key>     # first letters of a key, or all
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastvlm.data.encoded import EncodedImage
from fastvlm.data.shard_cache import cache_folder
from fastvlm.files import replacing, write_whole

FORMAT = 2
CHUNK_BYTES = 128 << 20  # a killed writer loses at most this much,
CHUNK_SECONDS = 60  # or this many seconds of work
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_OPEN = 64  # open chunk files per store


def features_folder() -> Path:
    """Return `$FASTVLM_CACHE/features`: not in a run's folder, because runs share it and it can be made again."""
    return cache_folder() / "features"


def image_key(data: EncodedImage) -> bytes:
    """Return the key of an image in a store: the SHA-256 of its encoded file."""
    return hashlib.sha256(data).digest()


class FeatureStore:
    """The features of one encoder under one transform.

    Args:
        description: everything the features depend on except the image, as JSON; its hash names the store.
        shape: (N, D) of one view.
        dtype: of the features.
        root: folder of all stores; None: `features_folder()`.
    """

    def __init__(
        self, description: dict, *, shape: tuple[int, int], dtype: torch.dtype, root: str | Path | None = None
    ):
        self.shape, self.dtype = tuple(shape), dtype
        self.description = description | {"format": FORMAT, "shape": list(shape), "dtype": str(dtype)}
        text = json.dumps(self.description, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder = Path(root or features_folder()) / self.key
        self.view_bytes = shape[0] * shape[1] * dtype.itemsize
        self._chunks: list[Path] = []
        self._prefix = np.empty(0, np.uint64)  # sorted: the first eight bytes of each key
        self._keys = np.empty((0, 32), np.uint8)
        self._chunk = np.empty(0, np.int32)
        self._start = np.empty(0, np.int64)  # bytes into the chunk's file
        self._views = np.empty(0, np.int32)
        self._sums = np.empty(0, np.int64)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Read the keys of new chunks. A file that is not a complete chunk of this store is deleted."""
        known = set(self._chunks)
        found = sorted(set(self.folder.glob("*.safetensors")) - known)
        keys, chunk, start, views, sums = [self._keys], [self._chunk], [self._start], [self._views], [self._sums]
        for path in found:
            try:
                offset, chunk_keys, chunk_views, chunk_sums = self._open(path)
            except (OSError, ValueError, LookupError, TypeError, struct.error):
                path.unlink(missing_ok=True)
                continue
            before = np.cumsum(chunk_views, dtype=np.int64) - chunk_views
            keys.append(chunk_keys)
            views.append(chunk_views)
            sums.append(chunk_sums)
            chunk.append(np.full(len(chunk_keys), len(self._chunks), np.int32))
            start.append(offset + before * self.view_bytes)
            self._chunks.append(path)
        self._keys, self._chunk, self._start = map(np.concatenate, (keys, chunk, start))
        self._views, self._sums = map(np.concatenate, (views, sums))
        prefix = prefixes(self._keys)
        order = np.argsort(prefix, kind="stable")
        self._prefix = prefix[order]
        self._keys, self._chunk = self._keys[order], self._chunk[order]
        self._start, self._views, self._sums = self._start[order], self._views[order], self._sums[order]

    def _open(self, path: Path) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Return the offset of a chunk's features, its keys, view counts and checksums.

        Raises:
            OSError, ValueError, LookupError, TypeError: not a complete chunk of this store.
        """
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError(f"{path}: a header of {length} bytes")
            header = json.loads(file.read(length))
            base, arrays = 8 + length, {}
            for name, dtype in (("keys", np.uint8), ("views", np.int32), ("sums", np.int64)):
                begin, end = header[name]["data_offsets"]
                file.seek(base + begin)
                arrays[name] = np.frombuffer(file.read(end - begin), dtype).reshape(header[name]["shape"])
        features = header["features"]
        whole = base + max(header[name]["data_offsets"][1] for name in ("features", *arrays))
        expected = [int(arrays["views"].sum()), *self.shape]
        if features["shape"] != expected or DTYPES[features["dtype"]] != self.dtype:
            raise ValueError(f"{path}: {features['dtype']} {features['shape']}, not {self.dtype} {expected}")
        if path.stat().st_size != whole or len({len(array) for array in arrays.values()}) > 1:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, its header says {whole}")
        return base + features["data_offsets"][0], arrays["keys"], arrays["views"], arrays["sums"]

    def keys(self) -> set[bytes]:
        """Return the keys of all images in the store."""
        return {key.tobytes() for key in self._keys}

    def _find(self, key: bytes) -> int | None:
        prefix = np.uint64(int.from_bytes(key[:8], "big"))
        at = int(np.searchsorted(self._prefix, prefix))
        while at < len(self._prefix) and self._prefix[at] == prefix:
            if self._keys[at].tobytes() == key:
                return at
            at += 1
        return None

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def empty(self, count: int, *, shared: bool = False) -> Shaped[Tensor, "v N D"]:
        """Return uninitialised memory for the features of `count` views.

        Args:
            shared: in shared memory, so that a loader process need not copy them there.
        """
        if not shared:
            return torch.empty(count, *self.shape, dtype=self.dtype)
        storage = torch.UntypedStorage._new_shared(max(1, count) * self.view_bytes)
        return torch.empty(0, dtype=self.dtype).set_(storage)[: count * math.prod(self.shape)].view(count, *self.shape)

    def read(self, key: bytes, *, out: Tensor | None = None) -> Shaped[Tensor, "v N D"]:
        """Read the features of all views of an image.

        Args:
            out: where to write them, as many views as the image has; None: fresh memory.

        Raises:
            KeyError: the image is not in the store.
            OSError: its chunk cannot be read, or is damaged and has been deleted.
        """
        at = self._find(key)
        if at is None:
            raise KeyError(key.hex())
        views = int(self._views[at])
        if out is None:
            out = self.empty(views)
        assert out.shape == (views, *self.shape) and out.dtype == self.dtype, f"{views} views into {tuple(out.shape)}"
        # preadv, not a memory map: a disk error then raises an exception instead of killing the process.
        view = memoryview(out.view(torch.uint8).numpy()).cast("B")
        read = os.preadv(self._descriptor(int(self._chunk[at])), [view], int(self._start[at]))
        if read != len(view) or zlib.crc32(view) != self._sums[at]:
            chunk = self._chunks[self._chunk[at]]
            chunk.unlink(missing_ok=True)
            raise OSError(f"{chunk} was damaged and is deleted")
        return out

    def _descriptor(self, chunk: int) -> int:
        fd = self._files.get(chunk)
        if fd is None:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            fd = self._files[chunk] = os.open(self._chunks[chunk], os.O_RDONLY)
        else:
            self._files.move_to_end(chunk)
        return fd

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    # -- writing --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create the folder and delete what killed writers left; call this only under `try_lock`."""
        (self.folder / "plans").mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(".*.part"):
            part.unlink(missing_ok=True)
        about = self.folder / "store.json"
        if not about.exists():
            write_whole(about, json.dumps(self.description, indent=1, sort_keys=True, default=str))

    def try_lock(self) -> int | None:
        """Return a descriptor that holds the write lock until it is closed; None while another run has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def has_plan(self, plan: str) -> bool:
        """Return whether every image of a plan is known to be in the store."""
        try:
            chunks = json.loads((self.folder / "plans" / f"{plan}.json").read_text())["chunks"]
        except (OSError, ValueError, KeyError):
            return False
        return set(chunks) <= {path.name for path in self._chunks}

    def note_plan(self, plan: str, *, keys: set[bytes], about: dict) -> None:
        """Note that the store holds all images of a plan."""
        chunks = sorted({self._chunks[self._chunk[at]].name for key in keys if (at := self._find(key)) is not None})
        write_whole(self.folder / "plans" / f"{plan}.json", json.dumps(about | {"chunks": chunks}, default=str))


class FeatureWriter:
    """Appends to a store in chunks; `close` writes the last. A chunk is on disk before its name appears.

    Raises:
        ValueError: the disk is full or cannot be written.
    """

    def __init__(self, store: FeatureStore, *, chunk_bytes: int = CHUNK_BYTES, chunk_seconds: float = CHUNK_SECONDS):
        self.store, self.chunk_bytes, self.chunk_seconds = store, chunk_bytes, chunk_seconds
        self.num_bytes = 0
        self._keys: list[bytes] = []
        self._views: list[int] = []
        self._features: list[Tensor] = []
        self._held, self._begun = 0, time.monotonic()

    def write(self, keys: Sequence[bytes], views: Sequence[int], features: Shaped[Tensor, "V N D"]) -> None:
        """Append images; `features` holds the views of all of them, one after another."""
        assert len(keys) == len(views) and sum(views) == len(features)
        assert features.dtype == self.store.dtype and tuple(features.shape[1:]) == self.store.shape
        if not self._keys:
            self._begun = time.monotonic()
        self._keys += keys
        self._views += views
        self._features.append(features)
        self._held += len(features) * self.store.view_bytes
        if self._held >= self.chunk_bytes or time.monotonic() - self._begun >= self.chunk_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the images appended so far as a chunk."""
        if not self._keys:
            return
        keys = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 32)
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
        tensors = {
            "features": torch.cat(self._features),
            "keys": torch.from_numpy(keys.copy()),
            "views": torch.tensor(self._views, dtype=torch.int32),
        }
        images = tensors["features"].split(self._views)
        tensors["sums"] = torch.tensor([zlib.crc32(image.view(torch.uint8).numpy()) for image in images])
        try:
            with replacing(self.store.folder / f"{name}.safetensors") as part:
                save_file(tensors, part)
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.store.folder}: features cannot be written ({error}); free the disk, or set FASTVLM_CACHE to "
                "another"
            ) from None
        self.num_bytes += self._held
        self._keys, self._views, self._features, self._held = [], [], [], 0

    def close(self) -> None:
        self.flush()


def prefixes(keys: np.ndarray) -> np.ndarray:
    """Return the first eight bytes of every key as a uint64."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def stores(root: Path | None = None) -> Iterator[tuple[Path, dict, int]]:
    """Yield (folder, description, bytes) of every store."""
    for folder in sorted((root or features_folder()).glob("*/")):
        about = {}
        with contextlib.suppress(OSError, ValueError):
            about = json.loads((folder / "store.json").read_text())
        yield folder, about, sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def main() -> None:
    chosen = None
    for argument in sys.argv[1:]:
        key, _, chosen = argument.partition("=")
        if key != "delete" or not chosen:
            sys.exit(f"error: {argument} is not delete=<first letters of a key> or delete=all")
    for folder, about, size in stores():
        gone = chosen == "all" or (chosen is not None and folder.name.startswith(chosen))
        encoder = str(about.get("encoder", {}).get("_target_", "?")).rsplit(".", 1)[-1]
        size_px = about.get("image", {}).get("image_size")
        what = f"{encoder} {size_px} px, {about.get('precision')}, {about.get('shape')}"
        print(f"{'deleted ' if gone else ''}{folder}  {size / 1e9:.2f} GB  {what}")
        if gone:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
