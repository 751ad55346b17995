"""Metrics as pure functions of predictions and references, and confidence intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def normalise_answer(text: str) -> str:
    """Normalise a short answer for comparison: stripped, lower case, without a full stop at the end."""
    text = text.strip().lower()
    return text[:-1].rstrip() if text.endswith(".") else text


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether prediction and reference are equal after `normalise_answer`."""
    return normalise_answer(prediction) == normalise_answer(reference)


def accuracy(correct: Sequence[bool]) -> float:
    """Return the share of correct ones in [0, 1]; nan if there are none at all."""
    return sum(map(bool, correct)) / len(correct) if len(correct) else math.nan


def mean_answer_length(lengths: Sequence[int]) -> float:
    """Return the mean answer length in tokens; nan if there are none."""
    return sum(lengths) / len(lengths) if len(lengths) else math.nan


def majority_answer(answers: Sequence[str]) -> str | None:
    """Return the most frequent normalised answer (the alphabetically first of ties); None without answers."""
    counts = Counter(map(normalise_answer, answers))
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else None


def wilson_interval(num_correct: int, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a share, valid near 0 and 1 and for few samples (Wilson 1927); z=1.96 is 95 %.

    Raises:
        ValueError: num_correct is not in [0, n].
    """
    if not 0 <= num_correct <= n:
        raise ValueError(f"{num_correct} correct of {n} is not a share")
    if n == 0:
        return 0.0, 1.0
    share, z2 = num_correct / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and 1 the bound is exact; rounding errors must not move it past the estimate.
    return (0.0 if num_correct == 0 else centre - half), (1.0 if num_correct == n else centre + half)


def bootstrap_interval(
    groups: Sequence[Sequence[float | int] | np.ndarray],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a percentile bootstrap interval of the mean of group means, resampling within each group.

    The groups (question types) are fixed and only their samples are random, so the interval says nothing about other
    types. Empty groups are left out; without any sample the interval is (nan, nan).

    Raises:
        ValueError: level is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1")
    rng = np.random.default_rng(seed)
    means = []
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        if len(values):
            means.append(values[rng.integers(len(values), size=(num_resamples, len(values)))].mean(axis=1))
    if not means:
        return math.nan, math.nan
    low, high = np.quantile(np.mean(means, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
