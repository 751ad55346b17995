"""Run one peer in its own process: reads one JSON request per line and answers each with one JSON line.

    PYTHONPATH=<root> <peer's python> -m benchmarks.peers.serve webdataset

Requests: {"do": "convert", "shards", "to"}, {"do": "speed", "folder", "pixels", "workers", "batch_size", "warm",
"count"}, {"do": "mix", "folder", "weights", "count", "seed", "out"}. Every peer is a module beside this one with

    PACKAGE: str                                            # its name on PyPI, or "" for none
    def convert(shards: Path, to: Path) -> None             # writes the same images and records in its own format
    def batches(folder, *, pixels, workers, batch_size)     # iterable of batches; `pixels(jpeg bytes)` makes the tensor
    def images(batch) -> Tensor                             # (images, 3, 336, 336); optional, default: batch[0]
    def mix(folder, *, weights, count, seed) -> list[int]   # source numbers of the first `count` samples
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import operator
import os
import sys
import time
import traceback
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """Return the CPU seconds of this process, its threads and all its descendants, running or reaped."""
    parents: dict[int, tuple[int, float]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/stat") as file:
                columns = file.read().rpartition(")")[2].split()
                # utime, stime, and cutime, cstime of reaped children (man 5 proc)
                parents[int(entry.name)] = (int(columns[1]), sum(map(int, columns[11:15])) / TICKS)
    me = os.getpid()
    total = time.process_time() + sum(os.times()[2:4])
    for pid, (parent, seconds) in parents.items():
        while parent not in (0, 1, me) and parent in parents:
            parent = parents[parent][0]
        if parent == me and pid != me:
            total += seconds
    return total


def speed(peer, request: dict) -> dict:
    """Measure CPU and wall seconds between two batches while the workers are running."""
    from benchmarks.peers import pixels

    options = {"workers": request["workers"], "batch_size": request["batch_size"]}
    source = peer.batches(Path(request["folder"]), pixels=pixels.NAMED[request["pixels"]], **options)
    iterator, images = iter(source), getattr(peer, "images", operator.itemgetter(0))
    done, begun = 0, 0
    for batch in iterator:
        tensor = images(batch)
        done += len(tensor)
        if begun == 0 and done >= request["warm"]:
            begun, cpu, wall = done, cpu_seconds(), time.perf_counter()
        elif begun and done >= begun + request["count"]:
            cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
            break
    else:
        raise ValueError(f"{done} images are too few to time {request['count']} after {request['warm']}")
    shape = [*tensor.shape[1:], str(tensor.dtype)]
    count = done - begun
    del batch, tensor, iterator, source
    gc.collect()
    return {"images": count, "cpu": cpu, "wall": wall, "image": shape}


def answer(peer, request: dict) -> dict:
    folder = Path(request.get("folder", ""))
    if request["do"] == "version":
        from importlib.metadata import version

        return {"version": version(peer.PACKAGE) if peer.PACKAGE else ""}
    if request["do"] == "convert":
        peer.convert(Path(request["shards"]), Path(request["to"]))
        return {}
    if request["do"] == "speed":
        return speed(peer, request)
    if request["do"] == "mix":
        import numpy as np

        order = peer.mix(folder, weights=request["weights"], count=request["count"], seed=request["seed"])
        np.save(request["out"], np.array(order, dtype=np.int16))
        return {}
    raise ValueError(f"unknown request {request['do']}")


def main() -> None:
    # Redirect what peers print to stderr, so that it cannot mix with the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    peer = importlib.import_module(f"benchmarks.peers.{sys.argv[1]}")
    for line in sys.stdin:
        try:
            reply = answer(peer, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
