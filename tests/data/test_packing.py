from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.data.packing import (
    balance,
    best_fit_decreasing,
    close_rows,
    fill_rows,
    group_by_length,
    pack_window,
    window_of,
)

samples = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 4)), max_size=60)


def textbook(lengths, images, max_tokens, max_images):
    """Best-fit-decreasing with no data structure at all."""
    packs = []
    left = lambda pack: max_tokens - sum(lengths[k] for k in pack)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [p for p in packs if left(p) >= lengths[i] and sum(images[k] for k in p) + images[i] <= max_images]
        if fits:
            min(fits, key=left).append(i)
        else:
            packs.append([i])
    return packs


@settings(max_examples=100, deadline=None)
@given(samples)
def test_best_fit_decreasing_fills_as_the_textbooks(window):
    lengths, images = [n for n, _ in window], [0] * len(window)
    packs = best_fit_decreasing(lengths, images, max_tokens=100, max_images=4)
    filled = lambda packs: sorted(sum(lengths[i] for i in p) for p in packs)
    assert filled(packs) == filled(textbook(lengths, images, 100, 4))


@settings(max_examples=200, deadline=None)
@given(samples, st.sampled_from([pack_window, close_rows, best_fit_decreasing]))
def test_packs_hold_every_sample_once_and_keep_both_budgets(window, pack):
    lengths, images = [n for n, _ in window], [k for _, k in window]
    packs = pack(lengths, images, max_tokens=100, max_images=4)
    assert sorted(i for p in packs for i in p) == list(range(len(window)))
    assert all(p and sum(lengths[i] for i in p) <= 100 and sum(images[i] for i in p) <= 4 for p in packs)


@settings(max_examples=200, deadline=None)
@given(samples)
def test_a_window_never_needs_more_rows_than_best_fit_decreasing(window):
    lengths, images = [n for n, _ in window], [k for _, k in window]
    budget = {"max_tokens": 100, "max_images": 4}
    assert len(pack_window(lengths, images, **budget)) <= len(best_fit_decreasing(lengths, images, **budget))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_a_filled_row_comes_as_close_to_the_budget_as_any_subset_can(lengths):
    first = fill_rows(lengths, max_tokens=20)[0]
    longest = max(lengths)
    rest = sorted(lengths)[:-1]
    sums = {0}
    for n in rest:
        sums |= {s + n for s in sums}
    assert sum(lengths[i] for i in first) == longest + max(s for s in sums if s <= 20 - longest)


def test_samples_of_like_length_leave_hardly_a_gap():
    """Lengths of the embedded instructions: 40-61 tokens, some prose; rows of 512."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(40, 62, 980), rng.integers(80, 122, 20)])
    packs = pack_window(rng.permutation(lengths).tolist(), [1] * 1000, max_tokens=512, max_images=16)
    assert lengths.sum() / (len(packs) * 512) > 0.985


def test_packs_stand_in_the_order_their_samples_arrived():
    lengths = np.random.default_rng(0).integers(10, 60, 300).tolist()
    packs = pack_window(lengths, [0] * 300, max_tokens=100, max_images=1)
    means = [np.mean(p) for p in packs]
    assert means == sorted(means)


def test_rows_are_filled_far_better_than_in_the_order_of_arrival():
    """Samples of 114-864 tokens in rows of 2,048."""
    lengths = np.random.default_rng(0).integers(114, 865, 1000).tolist()
    packs = pack_window(lengths, [1] * 1000, max_tokens=2048, max_images=8)
    rows, free = 0, 0
    for length in lengths:
        rows, free = (rows, free - length) if length <= free else (rows + 1, 2048 - length)
    assert sum(lengths) / (len(packs) * 2048) > 0.99
    budget = {"max_tokens": 2048, "max_images": 8}
    assert len(packs) < len(best_fit_decreasing(lengths, [1] * 1000, **budget))  # by rows that a pair closes exactly
    assert sum(lengths) / (rows * 2048) < 0.88


def test_grouping_by_length_keeps_neighbours_alike_and_every_sample():
    lengths = np.random.default_rng(1).integers(1, 1000, 256).tolist()
    groups = group_by_length(lengths, group=8)
    assert sorted(i for group in groups for i in group) == list(range(256))
    assert np.mean([max(lengths[i] for i in g) - min(lengths[i] for i in g) for g in groups]) < 50


def test_balanced_packs_keep_shares_that_packing_by_length_would_lose():
    rng = np.random.default_rng(0)
    sources = np.arange(1000) % 2  # half the samples each, and one source's are four times as long
    lengths = np.where(sources == 0, rng.integers(10, 30, 1000), rng.integers(60, 100, 1000))
    packs = pack_window(lengths.tolist(), [0] * 1000, max_tokens=256, max_images=1)
    halves = [Fraction(1, 2)] * 2
    balanced = balance(packs, sources=sources, costs=np.ones(1000, dtype=np.int32), weights=halves)
    assert sorted(map(tuple, balanced)) == sorted(map(tuple, packs))
    count = lambda packs, source: sum(sources[i] == source for pack in packs for i in pack)
    error = lambda packs: max(abs(count(packs[:n], 0) - count(packs[:n], 1)) / 2 for n in range(len(packs)))
    assert error(balanced) < 7 < error(packs)


def test_a_window_holds_a_hundred_rows_so_that_its_last_one_costs_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, 20_000).tolist()
    budget = {"max_tokens": 4096, "max_images": 16}
    window = window_of(sum(lengths) / len(lengths), 0, **budget)
    useful = lambda window: sum(lengths[:window]) / 4096 / len(pack_window(lengths[:window], [0] * window, **budget))
    assert window > 3000 and useful(window) >= 0.99 > useful(1000)
    assert window_of(50, 1, max_tokens=256, max_images=16) == 1000
    assert window_of(10, 1, max_tokens=4096, max_images=100) == 10_000  # images fill a row before words do
