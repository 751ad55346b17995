"""From paired seeds to a verdict: exact sign-flip tests, intervals, and how many seeds an open question would need.

Pure functions of numbers. Differences are always signed so that above 0 supports the claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 0.05  # level of the one-sided sign-flip test on each side, and of the two-sided interval
POWER = 0.8
MOST_SEEDS = 1000
AGREES, DISAGREES, OPEN, SHOWN = "agrees", "disagrees", "not resolved", "difference"
# Above this many seeds the sign flips are sampled, not enumerated.
ENUMERATE_UP_TO = 16
DRAWS = 100_000
# Up to this many seeds the power of the sign-flip test is simulated; above, that of the t-test is used.
DRAWN_UP_TO = 10

Differences = Sequence[float] | np.ndarray


def sign_flip_p(differences: Differences, *, seed: int = 0) -> float:
    """Return P(mean >= the observed mean) if each difference were equally likely to have the other sign.

    Exact up to 16 seeds, above from 100,000 samples (the observed signs are one of them, so it is never 0).
    Source: Fisher's randomisation test for paired samples (The Design of Experiments, section 21).

    Raises:
        ValueError: no differences, or one that is not a finite number.
    """
    d = _checked(differences)
    if len(d) <= ENUMERATE_UP_TO:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, size=(DRAWS, len(d)))
        signs[0] = 1
    sums = signs @ d
    # The tolerance keeps ties, although sums in another order differ in the last bits.
    return float((sums >= d.sum() - 1e-9 * np.abs(d).sum()).mean())


def mean_interval(differences: Differences, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's t interval for the mean of the differences; infinite with a single one."""
    d = _checked(differences)
    if len(d) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf((1 + confidence) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    return float(d.mean() - half), float(d.mean() + half)


def fewest_seeds(alpha: float = ALPHA) -> int:
    """Return the fewest seeds with which a sign-flip p can be as small as `alpha`: its smallest value is 2 ** -n."""
    return math.ceil(math.log2(1 / alpha))


def seeds_needed(distances: Differences, *, deviation: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Return the number of seeds with which both tests of a verdict would reach this power; None: over 1,000, or never.

    The t-test's power is exact. The sign-flip test is as strong with many seeds, but needs a few more if there are few
    (with five, all must have one sign); its power is simulated up to 10.

    Args:
        distances: from the mean difference to each bound it must clear: one for "better", two for "the same".
        deviation: standard deviation of the paired differences.
    """
    if not math.isfinite(deviation) or min(distances) <= 0:
        return None
    least = fewest_seeds(alpha)
    if deviation == 0:
        return least
    effects = [distance / deviation for distance in distances]

    def enough(n: int) -> bool:
        critical = stats.t.ppf(1 - alpha / 2, n - 1)
        missed = [float(stats.nct.cdf(critical, n - 1, effect * math.sqrt(n))) for effect in effects]
        missed = [0.0 if math.isnan(m) else m for m in missed]  # scipy's series overflows for very large effects
        return sum(missed) <= 1 - power

    first, last = max(2, least), MOST_SEEDS
    if not enough(last):
        return None
    while first < last:  # power grows with n
        middle = (first + last) // 2
        first, last = (first, middle) if enough(middle) else (middle + 1, last)
    while first <= DRAWN_UP_TO and joint_power(effects, first, alpha=alpha) < power:
        first += 1
    return first


def joint_power(effects: Sequence[float], n: int, *, alpha: float = ALPHA, draws: int = 2000) -> float:
    """Return the share of simulated samples of `n` normal differences that pass both tests against every bound.

    Deterministic: the noise has a fixed seed.

    Args:
        effects: distance of the mean from each bound, in standard deviations: from the only one, or from the lower and
            the upper one.
    """
    noise = np.random.default_rng(0).normal(size=(draws, DRAWN_UP_TO))[:, :n]
    passed = np.ones(draws, dtype=bool)
    for effect, side in zip(effects, (1, -1), strict=False):
        passed &= _passes(min(effect, 100.0) + side * noise, alpha=alpha)
    return float(passed.mean())


def _passes(d: np.ndarray, *, alpha: float) -> np.ndarray:
    """Return which rows of differences both tests find to be above 0."""
    n = d.shape[1]
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    total = d.sum(axis=1)
    flipped = (d @ signs.T >= (total - 1e-9 * np.abs(d).sum(axis=1))[:, None]).mean(axis=1)
    t = total / math.sqrt(n) / d.std(axis=1, ddof=1)
    return (flipped <= alpha) & (t > stats.t.ppf(1 - alpha / 2, n - 1))


@dataclass(frozen=True)
class Verdict:
    """The outcome of one claim on paired seeds.

    Args:
        outcome: agrees, disagrees or not resolved; `difference` for a metric that is only shown.
        num_seeds: number of pairs.
        mean, low, high: the difference in favour of the claim and its 95 % interval, which decides.
        p: sign-flip p on the outcome's side; if not resolved, the smaller of both sides (for `same`, the larger).
        needed: seeds an open question would need; None if it is not open, or if 1,000 are too few.
    """

    outcome: str
    num_seeds: int
    mean: float
    low: float
    high: float
    p: float
    needed: int | None = None


def decide(differences: Differences, *, margin: float = 0.0, alpha: float = ALPHA) -> Verdict:
    """Decide whether the arm that a claim favours is better by more than `margin`.

    Agrees: the sign-flip test rejects "no better than the margin" at `alpha`, and the whole interval of the mean lies
    above the margin. Disagrees: by the same tests the difference is below 0, or below a negative margin (which makes
    the claim "no worse than that"). Both tests are required because, with few seeds, the first ignores how large the
    differences are and the second assumes that they are normal. If nothing differs, about one case in twenty still gets
    a verdict, counting both sides.
    """
    d = _checked(differences)
    floor = min(margin, 0.0)
    for_it, against = sign_flip_p(d - margin), sign_flip_p(floor - d)
    low, high = mean_interval(d, confidence=1 - alpha)
    if for_it <= alpha and low > margin:
        return _verdict(AGREES, d, for_it)
    if against <= alpha and high < floor:
        return _verdict(DISAGREES, d, against)
    mean = float(d.mean())
    # For a mean between 0 and a positive margin no number of seeds decides: the distance is negative.
    distance = mean - margin if mean > floor else floor - mean
    return _verdict(OPEN, d, min(for_it, against), seeds_needed([distance], deviation=_deviation(d), alpha=alpha))


def decide_same(differences: Differences, *, margin: float, alpha: float = ALPHA) -> Verdict:
    """Decide whether two arms differ by less than `margin`.

    Agrees: two one-sided sign-flip tests (Schuirmann 1987) at `alpha`, and the whole interval, as in `decide`, lies
    within the margin. Disagrees: by both tests the difference is larger than the margin.

    Raises:
        ValueError: a margin of 0 or less, with which nothing can be shown to be equal.
    """
    if margin <= 0:
        raise ValueError(f"margin={margin}: a claim that two arms are the same needs a margin above 0")
    d = _checked(differences)
    below, above = sign_flip_p(margin - d), sign_flip_p(d + margin)
    low, high = mean_interval(d, confidence=1 - alpha)
    inside = max(below, above)
    if inside <= alpha and -margin < low and high < margin:
        return _verdict(AGREES, d, inside)
    for side in (d, -d):
        p = sign_flip_p(side - margin)
        if p <= alpha and mean_interval(side, confidence=1 - alpha)[0] > margin:
            return _verdict(DISAGREES, d, p)
    mean = abs(float(d.mean()))
    distances = [margin - mean, margin + mean] if mean < margin else [mean - margin]
    return _verdict(OPEN, d, inside, seeds_needed(distances, deviation=_deviation(d), alpha=alpha))


def _verdict(outcome: str, d: np.ndarray, p: float, needed: int | None = None) -> Verdict:
    low, high = mean_interval(d)
    if needed is not None:
        needed = max(needed, len(d) + 1)
    return Verdict(outcome, len(d), float(d.mean()), low, high, p, needed)


def describe_only(differences: Differences) -> Verdict:
    """Return mean, interval and sign-flip p (of the smaller side) but no outcome, for a metric that is only shown."""
    d = _checked(differences)
    return _verdict(SHOWN, d, min(sign_flip_p(d), sign_flip_p(-d)))


def _deviation(d: np.ndarray) -> float:
    return float(d.std(ddof=1)) if len(d) > 1 else math.inf


def _checked(differences: Differences) -> np.ndarray:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise ValueError(f"differences must be one or more finite numbers, these are {list(differences)}")
    return d
