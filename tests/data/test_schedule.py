"""Shares at every prefix, against the bound of Bennett and Zhang (INFOCOM 1996), in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain, cycle, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.data.schedule import FairSchedule, prefix_error

queue = st.lists(st.integers(1, 1000), min_size=1, max_size=12)
mixtures = st.lists(st.tuples(st.integers(1, 1000), queue), min_size=1, max_size=8)


def serve(weights, queues, count, take):
    """Exact errors of every source after every prefix, and the order."""
    order = take(weights, [cycle(q) for q in queues], count)
    costs, served, total, errors = [cycle(q) for q in queues], [0] * len(queues), 0, []
    for source in order:
        cost = next(costs[source])
        served[source] += cost
        total += cost
        errors.append([s - w * total for s, w in zip(served, weights)])
    return errors, order


def take_fair(weights, costs, count):
    return FairSchedule(weights, costs).take(count).tolist()


def take_largest_deficit(ahead):
    def take(weights, costs, count):
        served, order = [0] * len(weights), []
        for total in range(count):
            source = max(range(len(weights)), key=lambda i: weights[i] * (total + ahead) - served[i])
            served[source] += next(costs[source])
            order.append(source)
        return order

    return take


def normalised(numbers):
    return [Fraction(n, sum(numbers)) for n in numbers]


@settings(max_examples=150, deadline=None)
@given(mixtures, st.integers(1, 400))
def test_no_source_is_ever_further_from_its_share_than_one_sample(mixture, count):
    weights, queues = normalised([w for w, _ in mixture]), [q for _, q in mixture]
    largest = max(chain(*queues))
    for errors in serve(weights, queues, count, take_fair)[0]:
        for error, weight, costs in zip(errors, weights, queues):
            assert -largest < error <= (1 - weight) * max(costs)


@pytest.mark.parametrize(
    ("ahead", "weights", "error"),
    [(0, [1, 16, 934], 1.46), (1, [2, 40, 295, 951], 1.007), (1, [257, 12, 12, 284, 3, 1, 5, 12], 1.155)],
)
def test_largest_deficit_first_breaks_the_bound_with_samples_of_equal_cost(ahead, weights, error):
    weights = normalised(weights)
    worst = lambda take: max(abs(e) for errors in serve(weights, [[1]] * len(weights), 400, take)[0] for e in errors)
    assert worst(take_fair) < 1 < error < worst(take_largest_deficit(ahead))


@settings(max_examples=30, deadline=None)
@given(mixtures, st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_the_order_does_not_depend_on_how_it_is_asked_for(mixture, pieces):
    weights, queues = normalised([w for w, _ in mixture]), [q for _, q in mixture]
    schedule = FairSchedule(weights, [cycle(q) for q in queues])
    parts = np.concatenate([schedule.take(n) for n in pieces])
    assert parts.tolist() == take_fair(weights, [cycle(q) for q in queues], sum(pieces))


def test_prefix_error_is_served_less_share():
    sources, costs = np.array([0, 1, 0]), np.array([2, 3, 5])
    assert prefix_error(sources, costs, 0, Fraction(1, 2)).tolist() == [1.0, -0.5, 2.0]


@pytest.mark.parametrize("weights", [[Fraction(1, 3), Fraction(2, 3)], [Fraction(1)]])
def test_equal_costs_give_the_exact_counts_at_the_end_of_a_cycle(weights):
    order = list(islice(take_fair(weights, [cycle([1])] * len(weights), 30), 30))
    assert [order.count(i) for i in range(len(weights))] == [30 * w for w in weights]
