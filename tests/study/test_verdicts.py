"""Verdicts against exhaustive enumeration and scipy, and never beyond what the seeds say."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastvlm.study.verdicts import (
    AGREES,
    DISAGREES,
    DRAWN_UP_TO,
    OPEN,
    decide,
    decide_same,
    fewest_seeds,
    mean_interval,
    seeds_needed,
    sign_flip_p,
)

numbers = st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3))


@given(st.lists(numbers, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_sign_flip_p_is_the_share_of_all_sign_assignments_that_reach_the_sum(differences):
    reached = [
        math.fsum(s * d for s, d in zip(signs, differences)) >= math.fsum(differences) - 1e-9
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_p(differences) == pytest.approx(sum(reached) / len(reached), abs=1e-12)


def test_the_sign_flip_p_is_that_of_scipys_permutation_test_of_paired_samples():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 9), rng.normal(0, 1, 9)
    theirs = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert sign_flip_p(a - b) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_drawn_sign_flips_are_near_the_enumerated_ones():
    d = np.random.default_rng(1).normal(0.3, 1, 17)
    signs = 1 - 2 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = (signs @ d >= d.sum() - 1e-9).mean()
    assert sign_flip_p(d) == pytest.approx(exact, abs=0.005)


def test_the_interval_is_scipys():
    d = [0.3, -0.1, 0.5, 0.2, 0.25]
    theirs = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert mean_interval(d) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert mean_interval([1.0]) == (-math.inf, math.inf)


@given(st.lists(numbers, min_size=1, max_size=7), st.floats(-1, 1))
@settings(max_examples=150, deadline=None)
def test_a_verdict_never_says_more_than_the_seeds(differences, margin):
    verdict = decide(differences, margin=margin)
    floor = min(margin, 0.0)
    if verdict.outcome == AGREES:
        assert verdict.num_seeds >= fewest_seeds() and verdict.low > margin and verdict.p <= 0.05
    if verdict.outcome == DISAGREES:
        assert verdict.num_seeds >= fewest_seeds() and verdict.high < floor and verdict.p <= 0.05
    if verdict.needed is not None:
        assert verdict.outcome == OPEN and verdict.needed > verdict.num_seeds
    assert verdict.low <= verdict.mean <= verdict.high


@given(st.lists(numbers, min_size=1, max_size=7))
@settings(max_examples=80, deadline=None)
def test_the_opposite_differences_have_the_opposite_verdict(differences):
    opposite = {AGREES: DISAGREES, DISAGREES: AGREES, OPEN: OPEN}
    assert decide([-d for d in differences]).outcome == opposite[decide(differences).outcome]


def test_under_no_effect_a_verdict_is_as_rare_as_alpha_promises():
    rng = np.random.default_rng(2)
    outcomes = [decide(rng.normal(0, 1, 6)).outcome for _ in range(400)]
    assert outcomes.count(AGREES) + outcomes.count(DISAGREES) < 0.05 * 400 + 10


def test_no_verdict_stands_beside_an_interval_that_reaches_beyond_it():
    reaching = [0.01, 0.02, 0.03, 0.12, 0.15]  # all on one side, and a one-sided interval too
    assert mean_interval(reaching)[0] < 0 < mean_interval(reaching, confidence=0.9)[0]
    assert decide(reaching).outcome == decide(np.negative(reaching)).outcome == OPEN
    low, high = mean_interval(reaching)
    assert decide_same(reaching, margin=high - 0.01).outcome == OPEN
    assert decide_same(reaching, margin=high + 0.01).outcome == AGREES


def test_one_far_seed_among_five_of_the_same_sign_decides_nothing():
    assert sign_flip_p([0.01, 0.01, 0.01, 0.01, 9.0]) <= 0.05
    assert decide([0.01, 0.01, 0.01, 0.01, 9.0]).outcome == OPEN


def test_four_seeds_can_decide_nothing_and_five_can():
    assert decide([1.0, 1.01, 0.99, 1.0]).outcome == OPEN
    assert decide([1.0, 1.01, 0.99, 1.0, 1.0]).outcome == AGREES
    assert decide([-1.0, -1.01, -0.99, -1.0, -1.0]).outcome == DISAGREES
    assert fewest_seeds() == 5


def test_equality_needs_a_margin_and_is_shown_only_within_it():
    near = [0.001, -0.002, 0.0015, 0.0, 0.001]
    assert decide_same(near, margin=0.02).outcome == AGREES
    assert decide_same(near[:4], margin=0.02).outcome == OPEN
    assert decide_same([0.2, 0.21, 0.19, 0.2, 0.2], margin=0.02).outcome == DISAGREES
    assert decide_same([-0.2, -0.21, -0.19, -0.2, -0.2], margin=0.02).outcome == DISAGREES
    with pytest.raises(ValueError, match="margin"):
        decide_same(near, margin=0.0)


@given(st.lists(numbers, min_size=1, max_size=7), st.floats(0.01, 1))
@settings(max_examples=80, deadline=None)
def test_two_arms_are_called_the_same_only_where_every_bound_lies_within_the_margin(differences, margin):
    verdict = decide_same(differences, margin=margin)
    low, high = mean_interval(differences)
    if verdict.outcome == AGREES:
        assert -margin < low and high < margin and verdict.num_seeds >= fewest_seeds()
    if verdict.outcome == DISAGREES:
        assert low > margin or high < -margin


def test_the_seeds_an_open_question_needs_have_the_power_that_simulation_finds():
    d = np.array([0.9, -0.3, 0.5, 0.1])
    n = seeds_needed([d.mean()], deviation=d.std(ddof=1))
    draws = np.random.default_rng(3).normal(d.mean(), d.std(ddof=1), size=(4000, n))
    power = (stats.ttest_1samp(draws, 0, axis=1, alternative="greater").pvalue <= 0.025).mean()
    assert power == pytest.approx(0.8, abs=0.05)
    assert seeds_needed([0.0], deviation=1.0) is None and seeds_needed([1.0], deviation=math.inf) is None
    assert seeds_needed([1.0], deviation=0.0) == fewest_seeds()


@pytest.mark.parametrize("effect", [0.9, 1.2, 1.48, 3.0])
def test_the_seeds_needed_give_a_verdict_as_often_as_promised_both_tests_counted(effect):
    n = seeds_needed([effect], deviation=1.0)
    draws = np.random.default_rng(4).normal(effect, 1.0, size=(400, n))

    def agrees(d) -> bool:  # as `decide` does, without the seeds that an open question would need
        return sign_flip_p(d) <= 0.05 and mean_interval(d)[0] > 0

    told, fewer = np.mean([agrees(d) for d in draws]), np.mean([agrees(d[:-1]) for d in draws])
    assert told > 0.8 - 0.05 and (n == fewest_seeds() or fewer < 0.8 + 0.05)


def test_the_seeds_that_equality_needs_tell_it_as_often_as_promised():
    n = seeds_needed([1.0, 1.0], deviation=1.2)  # a difference of 0 with a margin of 1
    draws = np.random.default_rng(5).normal(0.0, 1.2, size=(200, n))
    assert np.mean([decide_same(d, margin=1.0).outcome == AGREES for d in draws]) > 0.8 - 0.08
    assert n > seeds_needed([1.0], deviation=1.2)
    d = np.array([1.2, -1.2, 1.0, -1.0])
    assert decide_same(d, margin=1.0).needed == seeds_needed([1.0, 1.0], deviation=d.std(ddof=1))


@pytest.mark.parametrize("distance", [1.5, 1.8, 2.5])
def test_few_seeds_that_equality_needs_are_counted_with_both_of_its_sides(distance):
    n = seeds_needed([distance, distance], deviation=1.0)
    assert n <= DRAWN_UP_TO  # where the sign-flip test's own power counts
    draws = np.random.default_rng(6).normal(0.0, 1.0, size=(600, n))

    def same(d) -> bool:  # as `decide_same` does, without the seeds that an open question would need
        low, high = mean_interval(d)
        sides = (sign_flip_p(distance - d), sign_flip_p(d + distance))
        return max(sides) <= 0.05 and -distance < low and high < distance

    assert np.mean([same(d) for d in draws]) > 0.8 - 0.04


def test_a_difference_between_nothing_and_the_margin_is_told_by_no_number_of_seeds():
    verdict = decide([0.4, 0.6, 0.5, 0.45, 0.55], margin=1.0)
    assert verdict.outcome == OPEN and verdict.needed is None
    assert decide([-0.4, 0.6, -0.5, -0.45, 0.15], margin=1.0).needed is not None


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        decide([0.1, math.nan])
    with pytest.raises(ValueError, match="finite"):
        sign_flip_p([])
