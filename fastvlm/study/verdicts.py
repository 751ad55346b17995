"""From paired seeds to a verdict: exact sign-flip tests, intervals, and how many seeds an open question would need.

Pure functions of numbers. A difference is always counted so that above 0 speaks for the claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 0.05  # of the sign-flip test on each side, and of the interval on both together
POWER = 0.8
MOST_SEEDS = 1000
AGREES, DISAGREES, OPEN, SHOWN = "agrees", "disagrees", "not resolved", "difference"
# Above this many seeds the sign flips are drawn, not enumerated.
ENUMERATE_UP_TO = 16
DRAWS = 100_000
# Up to this many seeds the power of the sign-flip test is drawn, above it is the t-test's.
DRAWN_UP_TO = 10

Differences = Sequence[float] | np.ndarray


def sign_flip_p(differences: Differences, *, seed: int = 0) -> float:
    """P(mean >= the observed mean) if every difference might as well have had the other sign: exact up to 16 seeds,
    from 100,000 draws above (the observed one counted in, so it is never 0).

    Source: Fisher's randomisation test for paired samples (The Design of Experiments, section 21).

    Raises:
        ValueError: no differences, or one that is no finite number.
    """
    d = _checked(differences)
    if len(d) <= ENUMERATE_UP_TO:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, size=(DRAWS, len(d)))
        signs[0] = 1
    sums = signs @ d
    # Sums of the same numbers in another order differ in the last bits; a tie is a tie.
    return float((sums >= d.sum() - 1e-9 * np.abs(d).sum()).mean())


def mean_interval(differences: Differences, *, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean of the differences; infinite with a single one."""
    d = _checked(differences)
    if len(d) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf((1 + confidence) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    return float(d.mean() - half), float(d.mean() + half)


def fewest_seeds(alpha: float = ALPHA) -> int:
    """Below this many seeds no outcome whatever has a sign-flip p of `alpha`: 2 ** -n is its smallest value."""
    return math.ceil(math.log2(1 / alpha))


def seeds_needed(distances: Differences, *, deviation: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Seeds with which paired differences of this deviation would, with this power, be told to lie beyond every bound
    that they are `distances` away from (one for "better", two for "the same"), by both tests of a verdict.

    The t-test's power is exact; the sign-flip test, which is as strong with many seeds, costs a few more
    where they are few (with five, all must have one sign), and is drawn up to 10. None: over 1,000, or never.
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
        missed = [0.0 if math.isnan(m) else m for m in missed]  # so large an effect that scipy's series overflows
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
    """Share of samples of `n` normal differences that pass the t-test and the sign-flip test against every bound; the
    same at every call.

    Args:
        effects: how far the mean lies from each bound, in deviations: from the only one, or from the one below it and
            the one above.
    """
    noise = np.random.default_rng(0).normal(size=(draws, DRAWN_UP_TO))[:, :n]
    passed = np.ones(draws, dtype=bool)
    for effect, side in zip(effects, (1, -1), strict=False):
        passed &= _passes(min(effect, 100.0) + side * noise, alpha=alpha)
    return float(passed.mean())


def _passes(d: np.ndarray, *, alpha: float) -> np.ndarray:
    """Which rows of differences both tests tell to be above 0."""
    n = d.shape[1]
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    total = d.sum(axis=1)
    flipped = (d @ signs.T >= (total - 1e-9 * np.abs(d).sum(axis=1))[:, None]).mean(axis=1)
    t = total / math.sqrt(n) / d.std(axis=1, ddof=1)
    return (flipped <= alpha) & (t > stats.t.ppf(1 - alpha / 2, n - 1))


@dataclass(frozen=True)
class Verdict:
    """What paired seeds say of one claim.

    Args:
        outcome: agrees, disagrees or not resolved; `difference` of a metric that is only shown.
        num_seeds: pairs.
        mean, low, high: of the difference in favour of the claim, and its 95 % interval, which decides.
        p: sign-flip p of the outcome's side (the smaller side's where not resolved).
        needed: seeds an open question would need; None where it is not open, never, or beyond 1,000.
    """

    outcome: str
    num_seeds: int
    mean: float
    low: float
    high: float
    p: float
    needed: int | None = None


def decide(differences: Differences, *, margin: float = 0.0, alpha: float = ALPHA) -> Verdict:
    """Whether the arm that a claim favours is better by more than `margin`.

    Agrees: the sign-flip test rejects "no better than the margin" at `alpha` and the whole interval of the mean lies
    above the margin. Disagrees: the same the other way round, against 0: the favoured arm is worse (against a margin
    below 0, which makes the claim "no worse than that", against the margin). Both tests must say so: with few seeds the
    first ignores how large differences are and the second believes them normal. Where nothing differs, about one
    case in twenty still gets a verdict, both sides together.
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
    # Between 0 and a margin above it neither side is ever told: the distance is below 0 there.
    distance = mean - margin if mean > floor else floor - mean
    return _verdict(OPEN, d, min(for_it, against), seeds_needed([distance], deviation=_deviation(d), alpha=alpha))


def decide_same(differences: Differences, *, margin: float, alpha: float = ALPHA) -> Verdict:
    """Whether two arms are the same but for `margin`: two one-sided tests (Schuirmann 1987), each exact, and the whole
    interval as in `decide` within the margin. Disagrees where the difference is larger than the margin.

    Raises:
        ValueError: a margin of 0 or less: nothing is ever shown to be equal.
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
    """Mean, interval and sign-flip p (the smaller side's), and no outcome: of a metric that decides nothing."""
    d = _checked(differences)
    return _verdict(SHOWN, d, min(sign_flip_p(d), sign_flip_p(-d)))


def _deviation(d: np.ndarray) -> float:
    return float(d.std(ddof=1)) if len(d) > 1 else math.inf


def _checked(differences: Differences) -> np.ndarray:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise ValueError(f"differences must be one or more finite numbers, these are {list(differences)}")
    return d
