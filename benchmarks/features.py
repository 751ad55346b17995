"""Cost and benefit of cached encoder outputs.

    python benchmarks/features.py stores    # safetensors chunks against LMDB; minutes, 4 GB of disk at a time
    python benchmarks/features.py stage     # the embedded align stage with and without; minutes
    python benchmarks/features.py large     # a ViT-B/16 at 336 px with random weights, a small language model; minutes

The last two take further overrides as arguments. Runs take turns in one process; ratios of CPU time are valid on a busy
machine, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = [(36, 128, "float32"), (144, 128, "float32"), (256, 768, "float16")]


def disk_bytes(folder: Path) -> int:
    """Return the bytes allocated on disk, not the file sizes, because an LMDB file is sparse."""
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

    # One transaction per 128 MB, as in the safetensors chunks.
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


def compare_stores(count: int = 10_000, rounds: int = 2) -> None:
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
                    wall, cpu = [], []
                    for _ in range(4):  # from the disk, then from memory
                        read = opened()
                        start, start_cpu = time.perf_counter(), time.process_time()
                        for i in order:
                            read(keys[i])
                        wall.append(time.perf_counter() - start)
                        cpu.append(time.process_time() - start_cpu)
                    results.setdefault(kind, []).append((written, wall[0], min(cpu), disk_bytes(Path(folder)) / pure))
        for kind, rows in results.items():
            written, cold, warm, size = (statistics.median(column) for column in zip(*rows))
            print(
                f"{n} x {d} {name} {kind:>11}: written {pure / written / 1e6:.0f} MB/s, random read "
                f"{cold / count * 1e6:.0f} us from the disk, {warm / count * 1e6:.0f} us of CPU from memory, "
                f"{size:.3f} x the pure size",
                flush=True,
            )


def train(config) -> dict:
    """Train a stage; return wall and CPU seconds per step (median without the first two steps), losses and features."""
    import lightning as L

    from fastvlm.pipeline import Pipeline

    marks: list[tuple[float, float]] = []

    class Clock(L.Callback):
        def on_train_batch_start(self, *_) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    plain = L.Trainer

    def with_clock(*, callbacks, **options):
        return plain(callbacks=[*callbacks, Clock()], **options)

    L.Trainer = with_clock
    try:
        Pipeline(config).run()
    finally:
        L.Trainer = plain
    (stage,) = (Path(config.paths.runs) / "stages").iterdir()
    records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    features = stage / "features.json"
    steps = list(zip(marks[2:], marks[3:]))
    return {
        "wall": statistics.median(b[0] - a[0] for a, b in steps),
        "cpu": statistics.median(b[1] - a[1] for a, b in steps),
        "losses": [r[key] for r in records for key in ("train/loss", "val/loss") if key in r],
        "features": json.loads(features.read_text()) if features.exists() else None,
    }


def compare_stages(*overrides: str, rounds: int = 3) -> None:
    from fastvlm.config import compose

    common = ["pipeline=align", "~task", "hardware=cpu", "hardware.threads=1", "num_samples=0", "logger=none"]
    results: dict[bool, list[dict]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("FASTVLM_CACHE")) as cache:
        os.environ["FASTVLM_CACHE"] = cache
        for _ in range(rounds):
            for cached in (False, True):
                with tempfile.TemporaryDirectory() as runs:
                    here = [f"paths.runs={runs}", "name=here", f"stages.align.cache_features={str(cached).lower()}"]
                    results[cached].append(train(compose("train", [*common, "log_every=1", *overrides, *here])))
    wall, cpu = ({c: statistics.median(r[key] for r in results[c]) for c in results} for key in ("wall", "cpu"))
    curves = [r["losses"] for c in results for r in results[c]]
    apart = max(abs(a - b) for curve in curves for a, b in zip(curves[0], curve, strict=True))
    first = results[True][0]["features"]
    print(
        f"steps/s without {1 / wall[False]:.2f}, with {1 / wall[True]:.2f}: {wall[False] / wall[True]:.2f} x; "
        f"by CPU time {cpu[False] / cpu[True]:.2f} x; losses at most {apart:g} apart over {len(curves[0])} values\n"
        f"writing {first['written']} images, {first['bytes'] / 1e6:.0f} MB: {first['seconds']:.1f} s, as long as "
        f"{first['seconds'] / wall[False]:.0f} steps without the cache (median of {rounds} runs each)"
    )


STAGES = {
    "stage": [["stages.align.steps=60", "stages.align.val_samples=32"]],
    "large": [
        ["encoder=timm", "encoder.name=vit_base_patch16_224", "encoder.pretrained=false", "encoder.img_size=336"],
        ["stages.align.image_size=336", "stages.align.packing=false", "stages.align.batch_size=4"],
        ["stages.align.steps=8", "stages.align.val_samples=4"],
    ],
}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("stores", *STAGES):
        sys.exit(f"error: say one of stores, {', '.join(STAGES)}; behind it what else to override")
    if sys.argv[1] == "stores":
        compare_stores()
    else:
        compare_stages(*(o for group in STAGES[sys.argv[1]] for o in group), *sys.argv[2:])
