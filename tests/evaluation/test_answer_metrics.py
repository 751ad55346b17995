import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.evaluation.metrics import (
    accuracy,
    bootstrap_interval,
    exact_match,
    majority_answer,
    mean_answer_length,
    normalise_answer,
    wilson_interval,
)


@pytest.mark.parametrize(
    "prediction, reference, same",
    [
        (" Three. ", "three", True),
        ("three .", "Three", True),
        ("4 7 2", "4 7 2.", True),
        ("4 7", "4 7 2", False),
        ("4  7", "4 7", False),
        ("3.5", "35", False),
        ("", "no", False),
        ("...", "..", False),
    ],
)
def test_exact_match_forgives_case_outer_space_and_one_full_stop(prediction, reference, same):
    assert exact_match(prediction, reference) is same


@given(st.text(max_size=20))
def test_an_answer_matches_itself_in_any_dress(text):
    assert exact_match(f" {text}\n", text)
    assert normalise_answer(text.upper().lower()) == normalise_answer(text.upper())


def test_the_wilson_interval_has_the_textbook_values():
    # Newcombe 1998, table I, method 3 (score, no continuity correction), 95 %.
    for correct, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(correct, n, z=1.959964) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 500), data=st.data())
def test_the_wilson_interval_holds_the_share_and_mirrors(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    mirrored = wilson_interval(n - correct, n)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-12)


def test_the_wilson_interval_of_nothing_is_everything():
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="5 correct of 4"):
        wilson_interval(5, 4)


def test_the_bootstrap_interval_agrees_with_the_normal_one_for_many_samples():
    rng = np.random.default_rng(0)
    groups = [rng.random(400) < p for p in (0.2, 0.5, 0.9)]
    low, high = bootstrap_interval(groups, num_resamples=4000)
    mean = np.mean([g.mean() for g in groups])
    error = np.sqrt(sum(g.var() / len(g) for g in groups)) / 3
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.003)


def test_the_bootstrap_interval_repeats_and_is_a_point_where_nothing_varies():
    assert bootstrap_interval([[1, 0, 1], [0, 1]]) == bootstrap_interval([[1, 0, 1], [0, 1]])
    assert bootstrap_interval([[1, 1], [0, 0, 0]]) == (0.5, 0.5)
    assert all(map(math.isnan, bootstrap_interval([[], []])))
    with pytest.raises(ValueError, match="level=95"):
        bootstrap_interval([[1]], level=95.0)


def test_means_and_majorities():
    assert accuracy([True, False, False, True]) == 0.5 and math.isnan(accuracy([]))
    assert mean_answer_length([1, 2, 6]) == 3 and math.isnan(mean_answer_length([]))
    assert majority_answer(["Two", "two.", "three"]) == "two"
    assert majority_answer(["b", "a"]) == "a" and majority_answer([]) is None
