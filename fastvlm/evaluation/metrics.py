"""What a score is: pure functions of predictions and references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def normalise_answer(text: str) -> str:
    """The form in which short answers are compared: no outer space, lower case, no full stop at the end."""
    text = text.strip().lower()
    return text[:-1].rstrip() if text.endswith(".") else text


def exact_match(prediction: str, reference: str) -> bool:
    """Whether prediction and reference are the same after `normalise_answer`."""
    return normalise_answer(prediction) == normalise_answer(reference)


def accuracy(correct: Sequence[bool]) -> float:
    """Share of the correct ones in [0, 1]; of nothing it is nan."""
    return sum(map(bool, correct)) / len(correct) if len(correct) else math.nan


def mean_answer_length(lengths: Sequence[int]) -> float:
    """Mean number of tokens of an answer; of nothing it is nan."""
    return sum(lengths) / len(lengths) if len(lengths) else math.nan


def majority_answer(answers: Sequence[str]) -> str | None:
    """The most frequent normalised answer (of equally frequent ones the first in the alphabet), None of nothing."""
    counts = Counter(map(normalise_answer, answers))
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else None


def wilson_interval(num_correct: int, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share, honest near 0 and 1 and for few samples (Wilson 1927); z = 1.96 is 95 %.

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
    # At the ends the bound is exactly 0 or 1; rounding must not push it off the estimate.
    return (0.0 if num_correct == 0 else centre - half), (1.0 if num_correct == n else centre + half)


def bootstrap_interval(
    groups: Sequence[Sequence[float | int] | np.ndarray],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over groups of their means, resampled within each group.

    The groups (question types) stand fixed, their samples are what chance could have made others: the interval says
    nothing about other types. Empty groups are left out.

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
