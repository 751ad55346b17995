"""Aggregate scored rows into a result: the mean, its breakdown into groups, and confidence intervals."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from fastvlm.evaluation.protocol import Protocol, mean

LEVEL = 0.95
NUMBER = re.compile(r"\d+")


def cluster_interval(
    scores: Sequence[float | int],
    clusters: Sequence[object],
    *,
    level: float = LEVEL,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a percentile bootstrap interval of the mean that resamples whole clusters.

    Questions about the same image are not independent, so images are resampled. The same seed draws the same clusters,
    on which paired comparisons rely.
    """
    low, high = np.quantile(
        resampled_means(scores, clusters, resamples=resamples, seed=seed), [(1 - level) / 2, (1 + level) / 2]
    )
    return float(low), float(high)


def resampled_means(
    scores: Sequence[float | int], clusters: Sequence[object], *, resamples: int, seed: int = 0
) -> np.ndarray:
    """Return bootstrap means (resamples,) as float64; each draws as many clusters as there are, with replacement."""
    names = {name: i for i, name in enumerate(dict.fromkeys(map(str, clusters)))}
    member = np.array([names[str(name)] for name in clusters])
    sums = np.bincount(member, weights=np.asarray(scores, dtype=np.float64), minlength=len(names))
    sizes = np.bincount(member, minlength=len(names))
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(names), size=len(names))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    return means


def make_result(name: str, rows: Sequence[dict], *, protocol: Protocol, split: str, resamples: int = 1000) -> dict:
    """Score rows and aggregate them.

    Returns:
        `predictions` (the rows with their scores), `table` (a row per group, then one for all), `metrics` (flat,
        `test/<task>/<metric>[/<group>]`), `interval`, and `faults` (counts of questions that could not be asked, by
        reason; reasons that differ only in their numbers are counted under the first).
    """
    scored = [dict(row) | grade for row, grade in zip(rows, protocol.score(rows), strict=True)]
    counted = [row for row in scored if protocol.counts(row)]
    for row in scored:
        if not protocol.counts(row):
            row["counted"] = False
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in counted:
        for group in dict.fromkeys(protocol.groups(row)):
            groups[group].append(row)
    key, table = protocol.metric, []
    chosen = [(group, groups[group]) for group in sorted(groups)] if len(groups) > 1 else []
    for group, members in [*chosen, ("all", counted)]:
        scores, clusters = [m["score"] for m in members], [m["image_id"] for m in members]
        low, high = cluster_interval(scores, clusters, resamples=resamples) if scores else (0.0, 0.0)
        table.append(
            {"type": group, "mean": group == "all", "n": len(members), key: mean(scores), "low": low, "high": high}
        )
    metrics = {f"test/{name}/{key}" + ("" if row["mean"] else f"/{row['type']}"): row[key] for row in table}
    figures = protocol.summarise(counted) if counted else {}
    metrics |= {f"test/{name}/{figure}": float(value) for figure, value in figures.items()}
    metrics[f"test/{name}/num_questions"] = float(len(counted))
    faults: dict[str, int] = defaultdict(int)
    reasons: dict[str, str] = {}
    for row in scored:
        if row.get("fault"):
            reason = row["fault"].split(":")[0]
            faults[reasons.setdefault(NUMBER.sub("#", reason), reason)] += 1
    if lengths := [row["tokens"] for row in scored if "tokens" in row]:
        metrics[f"test/{name}/answer_length"] = mean(lengths)
    return {
        "task": name,
        "metric": key,
        "split": split,
        "metrics": metrics,
        "table": table,
        "figures": figures,
        "interval": [table[-1]["low"], table[-1]["high"]],
        "faults": dict(faults),
        "predictions": scored,
    }


def describe(result: dict, *, width: int = 120, most: int = 40) -> str:
    """Format the table for a terminal of `width` columns, with at most the `most` largest groups."""
    from rich.console import Console
    from rich.table import Table

    key = result["metric"]
    asked = result.get("asked") or {}
    how = f"{result['split']} split"
    if asked:
        how += f", {asked['shots']} shots, {asked['form']}, {'with' if asked['ocr_tokens'] else 'without'} OCR tokens"
    table = Table()
    for i, column in enumerate(("questions of", "n", key.replace("_", " "), "95 %")):
        table.add_column(column, justify="right" if i else "left")
    rows = result["table"]
    kept = sorted(range(len(rows) - 1), key=lambda i: -rows[i]["n"])[:most]
    for i in [*sorted(kept), len(rows) - 1]:
        row = rows[i]
        interval = f"{100 * row['low']:.2f}-{100 * row['high']:.2f}"
        table.add_row(row["type"], str(row["n"]), f"{100 * row[key]:.2f}", interval, end_section=i == len(rows) - 2)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(f"{result['task']}: {key.replace('_', ' ')} x 100 ({how})", highlight=False)
    console.print(table, highlight=False)
    if figures := result["figures"]:
        console.print(", ".join(f"{name} {100 * value:.2f}" for name, value in figures.items()), highlight=False)
    if "tokenizer" in asked:
        console.print(f"tokens of captions: {asked['tokenizer']}", highlight=False)
    for why, count in result["faults"].items():
        console.print(f"{count} questions could not be asked, their answers are empty: {why}", highlight=False)
    return console.file.getvalue().rstrip("\n")
