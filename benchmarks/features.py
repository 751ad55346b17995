"""What cached encoder outputs cost and save.

python benchmarks/features.py stores             # safetensors chunks against LMDB; about two minutes, 9 GB of disk
python benchmarks/features.py stage              # the embedded align stage with and without; about two minutes
python benchmarks/features.py large              # a ViT-B/16 at 336 px with random weights, a small language model
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = [(36, 128, "float32"), (144, 128, "float32"), (256, 768, "float16")]


def disk_bytes(folder: Path) -> int:
    """What it takes on the disk: an LMDB file is sparse."""
    return sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file())


def drop_from_memory(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def write_safetensors(folder: Path, keys, value, shape, dtype):
    from fastvlm.data.features import FeatureStore, FeatureWriter

    store = FeatureStore({}, shape=shape, dtype=dtype, root=folder)
    store.prepare()
    writer = FeatureWriter(store)
    for start in range(0, len(keys), 64):
        part = keys[start : start + 64]
        writer.write(part, [1] * len(part), value[: len(part)].clone())
    writer.close()

    def opened():
        fresh = FeatureStore({}, shape=shape, dtype=dtype, root=folder)
        fresh.refresh()
        return fresh.read

    return opened


def write_lmdb(folder: Path, keys, value, shape, dtype):
    import lmdb
    import torch

    # One transaction and one sync a 128 MB, as the chunks have.
    batch = max(1, (128 << 20) // (value[0].numel() * dtype.itemsize))
    env = lmdb.open(str(folder / "store"), map_size=1 << 36, metasync=False)
    for start in range(0, len(keys), batch):
        with env.begin(write=True) as transaction:
            for i, key in enumerate(keys[start : start + batch]):
                row = value[i % len(value)]
                transaction.put(key, memoryview(row.view(torch.uint8).numpy()).cast("B"))
    env.sync(True)
    env.close()

    envs = []  # LMDB refuses to open a file twice in one process

    def opened():
        for old in envs:
            old.close()
        env = lmdb.open(str(folder / "store"), readonly=True, lock=False)
        envs[:] = [env]
        transaction = env.begin(buffers=True)

        def read(key: bytes):
            out = torch.empty(1, *shape, dtype=dtype)
            out.view(-1).copy_(torch.frombuffer(transaction.get(key), dtype=dtype))
            return out

        return read

    return opened


def compare_stores(count: int = 10_000, rounds: int = 3) -> None:
    import warnings

    import numpy as np
    import torch

    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    where = os.environ.get("FASTVLM_CACHE")
    for n, d, name in SIZES:
        dtype = getattr(torch, name)
        keys = [hashlib.sha256(str(i).encode()).digest() for i in range(count)]
        value = torch.randn(64, n, d).to(dtype)
        order = np.random.default_rng(0).permutation(count)
        pure = count * n * d * dtype.itemsize
        results: dict[str, list] = {}
        for _ in range(rounds):
            for kind, write in (("safetensors", write_safetensors), ("lmdb", write_lmdb)):
                with tempfile.TemporaryDirectory(dir=where) as folder:
                    start = time.perf_counter()
                    opened = write(Path(folder), keys, value, (n, d), dtype)
                    written = time.perf_counter() - start
                    drop_from_memory(Path(folder))
                    reads = []
                    for _ in range(2):  # from the disk, then from memory
                        read = opened()
                        start = time.perf_counter()
                        for i in order:
                            read(keys[i])
                        reads.append(time.perf_counter() - start)
                    results.setdefault(kind, []).append((written, *reads, disk_bytes(Path(folder)) / pure))
        for kind, rows in results.items():
            written, cold, warm, size = (statistics.median(column) for column in zip(*rows))
            print(
                f"{n} x {d} {name} {kind:>11}: written {pure / written / 1e6:.0f} MB/s, random read "
                f"{cold / count * 1e6:.0f} us from the disk, {warm / count * 1e6:.0f} us from memory, "
                f"{size:.3f} x the pure size",
                flush=True,
            )


if __name__ == "__main__":
    kinds = {"stores": compare_stores}
    if len(sys.argv) != 2 or sys.argv[1] not in kinds:
        sys.exit(f"error: say one of {', '.join(kinds)}")
    kinds[sys.argv[1]]()
