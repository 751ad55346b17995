"""Data that changed under an interrupted stage: what changed, and what the stage has already seen.

A plan is a function of its sources, so another shard or weight gives another plan, whose step 300 has nothing in common
with the first plan's. The stage's folder holds what is needed to continue with new data: the order of its plan with a
checksum of every sample's content (`order.npz`), and a description of what the plan was made of (`plan.json`). Samples
are recognised by their bytes, wherever they are stored now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastvlm.data.source_index import SourceIndex
from fastvlm.files import replacing, write_whole


@dataclass
class Seen:
    """What a stage has seen in `step` steps: the content of every source's samples and how often each came."""

    step: int
    sources: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (uint64 `content_of`, ascending; int64 times)

    @property
    def digest(self) -> str:
        """Hash of everything seen, part of the plan's fingerprint."""
        digest = hashlib.sha256(str(self.step).encode())
        for name, (content, times) in sorted(self.sources.items()):
            digest.update(name.encode() + content.tobytes() + times.tobytes())
        return digest.hexdigest()[:16]

    def times(self, name: str, index: SourceIndex) -> np.ndarray:
        """Return how often each row of a source has come: int64 (rows,), -1 for samples that did not exist."""
        times = np.full(index.num_samples, -1, dtype=np.int64)
        content, counts = self.sources.get(name, (np.empty(0, np.uint64), np.empty(0, np.int64)))
        if len(content):
            ours = content_of(index)
            at = np.minimum(np.searchsorted(content, ours), len(content) - 1)
            times[content[at] == ours] = counts[at[content[at] == ours]]
        return times

    def save(self, folder: Path) -> None:
        columns = {f"{kind}/{name}": a for name, pair in self.sources.items() for kind, a in zip(("c", "n"), pair)}
        write_arrays(folder / "seen.npz", step=np.array(self.step), **columns)

    @classmethod
    def load(cls, folder: Path) -> Seen:
        with np.load(folder / "seen.npz") as file:
            names = [key[2:] for key in file.files if key.startswith("c/")]
            return cls(int(file["step"]), {name: (file[f"c/{name}"], file[f"n/{name}"]) for name in names})


def content_of(index: SourceIndex) -> np.ndarray:
    """Return the CRC-32 and length of every sample's bytes as one number: uint64 (rows,)."""
    return (index.crc32.astype(np.uint64) << np.uint64(32)) | (index.size.astype(np.uint64) & np.uint64(0xFFFFFFFF))


def describe(plan) -> dict:
    """Describe what a plan is made of, for `changes`."""
    return {
        "base": plan.base,
        "unit": plan.unit,
        "sources": {
            s.name: {
                "weight": float(weight),
                "path": str(s.source.path),
                "samples": len(s.rows),
                "content": s.index.checksum,
                "rows": hashlib.sha256(content_of(s.index)[s.rows].tobytes()).hexdigest()[:16],
            }
            for s, weight in zip(plan.sources, plan.weights)
        },
    }


def write_order(plan, folder: Path) -> None:
    """Write what an interrupted stage would need (rank 0, when it begins); `plan.json` comes last."""
    plan.extend()
    order = plan.order.columns
    rows = plan.num_steps * plan.batch_size
    contents = {f"content/{s.name}": content_of(s.index) for s in plan.sources}
    end = order.end[: rows + 1]
    columns = {"source": order.source, "row": order.row, "place": order.place[: end[-1]], "end": end}
    write_arrays(folder / "order.npz", batch_size=np.array(plan.batch_size), **columns, **contents)
    if plan.after is not None:
        plan.after.save(folder)
    state = describe(plan) | {"after": plan.after and plan.after.digest}
    write_whole(folder / "plan.json", json.dumps(state, indent=1))


def read_description(folder: Path) -> dict | None:
    """Read `plan.json`; None if it is missing or unreadable."""
    try:
        return json.loads((folder / "plan.json").read_text())
    except (OSError, ValueError):
        return None


def seen_before(folder: Path, step: int) -> Seen:
    """Return what the stage in `folder` had seen before `step`, including under earlier plans of the same stage."""
    earlier = Seen.load(folder) if (folder / "seen.npz").exists() else Seen(0, {})
    sources = dict(earlier.sources)
    with np.load(folder / "order.npz") as file:
        end = file["end"]
        done = file["place"][: end[min(step * int(file["batch_size"]), len(end) - 1)]]
        source, row = file["source"][done], file["row"][done]
        names = [key.removeprefix("content/") for key in file.files if key.startswith("content/")]
        for i, name in enumerate(names):
            content = file[f"content/{name}"]
            times = np.bincount(row[source == i], minlength=len(content))
            # Includes samples not seen yet, with 0: a pass ends only when they have come, too.
            old, counts = sources.get(name, (np.empty(0, np.uint64), np.empty(0, np.int64)))
            both, inverse = np.unique(np.concatenate([content, old]), return_inverse=True)
            total = np.bincount(inverse, weights=np.concatenate([times, counts]), minlength=len(both))
            sources[name] = (both, total.astype(np.int64))
    return Seen(step, sources)


def changes(before: dict, plan, *, more: Sequence[str] = ()) -> list[str]:
    """List the differences between a plan's description and a plan, one short line each.

    Args:
        before: from `read_description`.
        more: other changes, of which neither of them knows.
    """
    now, lines = describe(plan), []
    if before["unit"] != now["unit"]:
        lines.append(f"unit {before['unit']} -> {now['unit']}")
    old, new = before["sources"], now["sources"]
    lines += [f"source {name} is gone" for name in old if name not in new]
    lines += [f"source {name} is new" for name in new if name not in old]
    for name in (n for n in new if n in old):
        a, b = old[name], new[name]
        if abs(a["weight"] - b["weight"]) > 1e-12:
            lines.append(f"share of {name} {a['weight']:.4g} -> {b['weight']:.4g}")
        if a["content"] != b["content"]:
            lines.append(f"shards of {name} ({b['path']}) changed: {a['samples']} -> {b['samples']} samples")
        elif a["rows"] != b["rows"]:
            lines.append(f"other samples of {name} are chosen: {a['samples']} -> {b['samples']}")
    return [*lines, *more] or ["the plan's own options"]


def write_arrays(path: Path, **columns: np.ndarray) -> None:
    with replacing(path) as part, open(part, "wb") as file:  # numpy would append .npz to a path without it
        np.savez(file, **columns)
