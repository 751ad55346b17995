"""The parts of benchmarks/data.py that read no images: accuracy of mixture shares (ours and the peers') and packing."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import made

# Substitutes for the data sets, 2,000 samples each: images, words per question and per answer (uniform, inclusive).
FAMILIES = {
    "captions": (1, (0, 0), (8, 40)),
    "interleaved": (2, (0, 0), (250, 1000)),
    "text": (0, (0, 0), (300, 1200)),
    "llava_instruct": (1, (15, 60), (40, 350)),
    "vqav2": (1, (4, 12), (1, 3)),
    "textvqa": (1, (5, 14), (1, 5)),
    "chartqa": (1, (8, 22), (1, 4)),
    "smoltalk": (0, (20, 200), (100, 900)),
}
MM1 = {"captions": 45, "interleaved": 45, "text": 10}
SFT_MINIMAL = {"llava_instruct": 50, "vqav2": 20, "textvqa": 12, "chartqa": 10, "smoltalk": 8}
MIXTURES = [("45/45/10", MM1, "samples"), ("45/45/10", MM1, "tokens"), ("sft_minimal", SFT_MINIMAL, "answer_tokens")]
TOKENS_PER_IMAGE, MAX_TOKENS = 64, 2048
COUNT = 100_000
FAMILY_SAMPLES = 2000


class Refused(Exception):
    """Raised when a peer answers a request with an error."""


def write_families(folder: Path) -> None:
    from fastvlm.data.shards import ShardWriter

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    for name, (num_images, question, answer) in FAMILIES.items():
        with ShardWriter(folder / name, "train") as writer:
            for i in range(FAMILY_SAMPLES):
                random = np.random.default_rng([13, *name.encode(), i])
                words = [int(random.integers(low, high + 1)) for low, high in (question, answer)]
                record = made.record(random, num_images=num_images, question=words[0], answer=words[1])
                writer.write(f"{i:06d}", record, [out.getvalue()] * num_images)


def plan(folder: Path, tokenizer, weights: dict[str, int], unit: str, **options):
    from fastvlm.data.plan import Plan
    from fastvlm.data.source import Mixture, Source

    sources = {name: Source(name, path=folder / name) for name in weights}
    budget = {"tokens_per_image": TOKENS_PER_IMAGE, "max_tokens": MAX_TOKENS, "batch_size": 8}
    return Plan(Mixture(sources, weights=weights, unit=unit), tokenizer, **budget | options)


def largest_error(sources: np.ndarray, costs: np.ndarray, weights: Sequence[float]) -> float:
    """Return the maximum over prefixes and sources of |cost served - share x total cost|, in the unit of `costs`."""
    total = np.cumsum(costs)
    served = (np.cumsum(np.where(sources == i, costs, 0)) for i in range(len(weights)))
    return max(float(np.abs(s - w * total).max()) for s, w in zip(served, np.array(weights) / sum(weights)))


def deal(sources: np.ndarray, pools: Sequence[np.ndarray], *, seed: int) -> np.ndarray:
    """Return the cost of each sample in a sequence of sources; every source cycles through its shuffled samples."""
    random, costs = np.random.default_rng(seed), np.empty(len(sources), dtype=np.int64)
    for i, pool in enumerate(pools):
        here = np.flatnonzero(sources == i)
        passes = [random.permutation(pool) for _ in range(len(here) // len(pool) + 1)]
        costs[here] = np.concatenate(passes)[: len(here)]
    return costs


def measure_shares(folder: Path, tokenizer, peers: dict[str, Callable], *, seeds: int, log: Callable) -> list[dict]:
    """Measure the share errors of our plan and of the peers, one row per mixture and unit.

    Peers can only mix by samples. For shares of tokens, a peer's weight is the share divided by the source's mean cost,
    which is correct on average; its error comes from random draws and varying lengths.

    Args:
        peers: name -> function (mixture, weights, seed) -> sequence of source numbers.
    """
    rows = []
    for mixture, weights, unit in MIXTURES:
        ours = plan(folder, tokenizer, weights, unit, packing=False, num_steps=1)
        sources, costs = ours.costs(COUNT, unit)
        pools = [costs[sources == i][:FAMILY_SAMPLES] for i in range(len(weights))]  # the first pass
        worth = float(max(pool.max() for pool in pools))
        shares = np.array(list(weights.values())) / sum(weights.values())
        row = {"mixture": mixture, "unit": unit, "samples": COUNT, "worth": worth}
        row |= {"errors": {}, "shares": {}, "refused": {}}
        row["mean_cost"] = {name: float(pool.mean()) for name, pool in zip(weights, pools)}
        row["errors"]["fastvlm"] = [largest_error(sources, costs, shares) / worth]
        row["shares"]["fastvlm"] = realised(sources, costs, len(weights))
        given = shares / [pool.mean() for pool in pools]
        given = (given / given.sum()).tolist()
        for name, mix in peers.items():
            errors = []
            for seed in range(seeds):
                try:
                    order = mix(f"{mixture}-{unit}".replace("/", "-"), given, seed)
                except Refused as refusal:
                    row["refused"][name] = str(refusal)
                    break
                dealt = deal(order, pools, seed=seed)
                errors.append(largest_error(order, dealt, shares) / worth)
            row["errors"][name] = errors
            if errors:
                row["shares"][name] = realised(order, dealt, len(weights))
            log(f"  {mixture} by {unit}: {name} " + (f"{np.median(errors):.1f}" if errors else "refused"))
        rows.append(row)
    return rows


def realised(sources: np.ndarray, costs: np.ndarray, count: int) -> list[float]:
    served = np.bincount(sources, weights=costs, minlength=count)
    return (served / served.sum()).tolist()


def measure_packing(folder: Path, tokenizer, *, count: int = 20_000, batch_size: int = 8) -> list:
    """Measure packers on `sft_minimal` (shares of answer tokens) in windows, without an image budget."""
    from fastvlm.data.packing import pack_window, window_of
    from fastvlm.data.plan_report import packing_efficiency

    made_plan = plan(folder, tokenizer, SFT_MINIMAL, "answer_tokens", packing=False, num_steps=1)
    lengths = made_plan.costs(count, "tokens")[1].tolist()
    rows = []
    for max_tokens in (2048, 4096):
        budget = {"max_tokens": max_tokens, "max_images": 10**6}
        window = window_of(sum(lengths) / count, 0, **budget)
        planned = packing_efficiency(plan(folder, tokenizer, SFT_MINIMAL, "answer_tokens", num_steps=100, **budget))
        rows.append({"max_tokens": max_tokens, "packer": "fastvlm, a plan of 100 steps", "rows": 100 * batch_size})
        rows[-1] |= {"useful": planned["filled_tokens"], "padding": planned["padding"]}
        packers = {"fastvlm": pack_window, "first-fit-decreasing": first_fit_decreasing, "arrival order": arrival_order}
        for name, pack in packers.items():
            totals = []
            for start in range(0, count, window):
                part = lengths[start : start + window]
                totals += [sum(part[i] for i in row) for row in pack(part, [0] * len(part), **budget)]
            useful = sum(totals) / (len(totals) * max_tokens)
            rows.append({"max_tokens": max_tokens, "packer": name, "rows": len(totals), "useful": useful})
            rows[-1]["padding"] = padding(totals, batch_size)
        rows.append({"max_tokens": max_tokens, "packer": "one sample a row", "rows": count, "useful": None})
        rows[-1]["padding"] = padding(lengths, batch_size)
    return rows


def arrival_order(
    lengths: Sequence[int], images: Sequence[int], *, max_tokens: int, max_images: int
) -> list[list[int]]:
    """Close a row at the first sample that does not fit; same interface as `pack_window`."""
    rows: list[list[int]] = []
    for i, length in enumerate(lengths):
        if not rows or length > tokens_left or images[i] > images_left:
            rows.append([])
            tokens_left, images_left = max_tokens, max_images
        rows[-1].append(i)
        tokens_left, images_left = tokens_left - length, images_left - images[i]
    return rows


def first_fit_decreasing(
    lengths: Sequence[int], images: Sequence[int], *, max_tokens: int, max_images: int
) -> list[list[int]]:
    """Put each sample, longest first, into the first row with room; same interface as `pack_window`."""
    rows: list[list[int]] = []
    room: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        k = next((k for k, (t, m) in enumerate(room) if t >= lengths[i] and m >= images[i]), len(rows))
        if k == len(rows):
            rows.append([])
            room.append([max_tokens, max_images])
        rows[k].append(i)
        room[k][0] -= lengths[i]
        room[k][1] -= images[i]
    return rows


def padding(totals: Sequence[int], batch_size: int) -> float:
    """Return the share of padding when every row is padded to the longest row of its batch."""
    batches = [totals[i : i + batch_size] for i in range(0, len(totals), batch_size)]
    return 1 - sum(totals) / sum(len(batch) * max(batch) for batch in batches)
