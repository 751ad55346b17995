"""Time and memory of planning ten million samples of eight sources, from their indexes on disk to the last step.

    python benchmarks/plan_scale.py --samples 10_000_000 --out /tmp/plan_scale     # 2 GB of disk, minutes of one core

First writes indexes for sparse shards (whose bytes are never read), with lengths like those of the sft_minimal
mixture's sources. Then one process plans everything, and a second one starts like a resumed run: it opens the indexes,
finds the plan and lists the samples of a step in the middle. Both write the files that a stage writes before its first
step (`write_plan`: order, identity, shares), unless they exist.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Per source: share of samples, weight in the mixture, text tokens (median and sigma of a log-normal), answer share.
SOURCES = {
    "llava_instruct": (0.16, 40, 280, 0.6, 0.70),
    "vqav2": (0.20, 15, 60, 0.3, 0.25),
    "textvqa": (0.04, 10, 70, 0.3, 0.25),
    "chartqa": (0.04, 8, 50, 0.3, 0.20),
    "smoltalk": (0.20, 8, 700, 0.7, 0.75),
    "captions": (0.20, 9, 60, 0.4, 0.80),
    "interleaved": (0.10, 5, 600, 0.5, 0.95),
    "text": (0.06, 5, 800, 0.5, 0.99),
}
IMAGES = {"smoltalk": 0, "text": 0, "interleaved": 3}
PER_SHARD = 10_000
PLAN = {"tokens_per_image": 64, "batch_size": 128, "max_tokens": 2048, "max_images": 32, "seed": 0}


def write_indexes(folder: Path, samples: int, tokenizer) -> None:
    import numpy as np
    import pyarrow as pa

    from fastvlm.data.sidecar import FORMAT, SCHEMA, checksum, sidecar, write_sidecar

    for number, (name, (share, _, mean, sigma, answers)) in enumerate(SOURCES.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        count, images = round(samples * share), IMAGES.get(name, 1)
        for shard, first in enumerate(range(0, count, PER_SHARD)):
            rng = np.random.default_rng([number, shard])
            n = min(PER_SHARD, count - first)
            size = np.full(n, 40_960)
            offset = np.arange(n) * 40_960
            text = np.clip(rng.lognormal(np.log(mean), sigma, n), 8, 1800).astype(np.int32)
            crc = rng.integers(0, 2**32, n, dtype=np.uint32)
            members = [
                [{"suffix": "json", "offset": o + 512, "size": 300}]
                + [{"suffix": f"{k}.jpg", "offset": o + 2048 + k * 9000, "size": 8000} for k in range(images)]
                for o in offset.tolist()
            ]
            columns = {
                "key": [f"{name}-{first + i:08d}" for i in range(n)],
                "offset": offset,
                "size": size,
                "members": members,
                "num_images": np.full(n, images, np.int32),
                "image_width": [[640] * images] * n,
                "image_height": [[480] * images] * n,
                "text_tokens": text,
                "answer_tokens": np.maximum(1, text * answers).astype(np.int32),
                "type": [""] * n,
                "numbers": [[]] * n,
                "crc32": crc,
                "fault": [""] * n,
            }
            table = pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)
            tar = folder / name / f"train-{shard:05d}.tar"
            with open(tar, "wb") as file:
                file.truncate(n * 40_960)
            stat = tar.stat()
            header = {
                "format": FORMAT,
                "shard_size": stat.st_size,
                "shard_mtime_ns": stat.st_mtime_ns,
                "checksum": checksum(offset, size, crc),
                "tokenizer": tokenizer.fingerprint,
                "broken": "",
                "suffixes": ["json", *(f"{k}.jpg" for k in range(images))],
            }
            write_sidecar(sidecar(tar), table, header)


def make_plan(folder: Path, tokenizer, samples: int):
    from fastvlm.data.plan import Plan
    from fastvlm.data.source import Mixture, Source

    # Do not rebuild indexes: the sparse shards hold nothing to build them from.
    sources = {name: Source(name, path=folder / name, rebuild_index=False) for name in SOURCES}
    mixture = Mixture(sources, weights={k: v[1] for k, v in SOURCES.items()}, unit="answer_tokens")
    return Plan(mixture, tokenizer, cache=folder / "plans", **PLAN)


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def step(folder: Path, samples: int, resume: bool) -> dict:
    """Plan from scratch, or start like a resumed run, in this process; return seconds and memory."""
    from fastvlm.build import build_tokenizer
    from fastvlm.config import compose
    from fastvlm.data.kept_plan import write_plan
    from fastvlm.data.plan_report import largest_error, packing_efficiency

    stage = folder / "stage"
    if not resume:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(folder / "plans", ignore_errors=True)
    stage.mkdir(exist_ok=True)
    tokenizer = build_tokenizer(compose("inspect"))
    begun, wall = time.process_time(), time.time()
    plan = make_plan(folder, tokenizer, samples)
    opened = time.process_time() - begun
    plan.extend()
    plan.step(plan.num_steps // 2)
    planned, before = time.process_time() - begun, peak_gib()
    write_plan(plan, stage, identity={})
    out = {
        "cpu_s": round(time.process_time() - begun, 1),
        "wall_s": round(time.time() - wall, 1),
        "opened_cpu_s": round(opened, 1),
        "planned_cpu_s": round(planned, 1),
        "planned_peak_gib": before,
        "peak_gib": peak_gib(),
        "samples": plan.epoch_samples,
        "steps": plan.num_steps,
    }
    if not resume:
        out |= {"largest_error": max(largest_error(plan, 100_000).values())} | packing_efficiency(plan)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, required=True, help="folder for the indexes; reused when it is there")
    parser.add_argument("--step", choices=("first", "resumed"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.out, args.samples, args.step == "resumed")))
        return
    done = args.out / f"written-{args.samples}"
    if not done.exists():
        from fastvlm.build import build_tokenizer
        from fastvlm.config import compose

        print(f"writing the indexes of {args.samples:,} samples below {args.out}", flush=True)
        write_indexes(args.out, args.samples, build_tokenizer(compose("inspect")))
        done.touch()
    for name in ("first", "resumed"):
        command = [sys.executable, __file__, "--out", str(args.out), "--samples", str(args.samples), "--step", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
        print(f"{name:8} {out.splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
