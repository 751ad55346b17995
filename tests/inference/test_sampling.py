import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastvlm.inference.sampling import Sampling, choose_tokens, keep_probable, probabilities_of

LOGITS = torch.tensor([[math.log(p) for p in (0.1, 0.4, 0.3, 0.2)]])


def kept(logits):
    return [i for i, value in enumerate(logits[0].tolist()) if value > -math.inf]


def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass():
    assert kept(keep_probable(LOGITS, top_p=0.0)) == [1]
    assert kept(keep_probable(LOGITS, top_p=0.4)) == [1]
    assert kept(keep_probable(LOGITS, top_p=0.5)) == [1, 2]
    assert kept(keep_probable(LOGITS, top_p=0.85)) == [1, 2, 3]
    assert kept(keep_probable(LOGITS, top_p=1.0)) == [0, 1, 2, 3]


def test_top_k_keeps_exactly_k_even_of_equal_logits():
    assert kept(keep_probable(LOGITS, top_k=2)) == [1, 2]
    assert len(kept(keep_probable(torch.zeros(1, 9), top_k=4))) == 4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 40), top_p=st.floats(0.05, 0.95))
def test_filters_agree_with_the_warpers_of_transformers(seed, top_k, top_p):
    logits = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) * 3
    expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits))
    assert torch.equal(keep_probable(logits, top_k=top_k, top_p=top_p) > -math.inf, expected > -math.inf)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.8, 5.0]),
    top_k=st.integers(1, 40),
    top_p=st.floats(0.05, 0.95),
)
def test_temperature_top_k_and_top_p_together_are_the_warpers_of_transformers_in_its_order(
    seed, temperature, top_k, top_p
):
    logits = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) * 3
    warpers = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    expected = LogitsProcessorList(warpers)(None, logits).softmax(-1)
    got = probabilities_of(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected)


def test_heat_widens_the_nucleus_that_is_drawn_from():
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(300)]
    drawn = lambda t: set(
        choose_tokens(LOGITS.expand(300, -1), temperature=t, top_p=0.6, generators=generators()).tolist()
    )
    # Shares at temperature 1: 0.4, 0.3, ...; at 0.3 the first alone holds 0.6; near equal when hot.
    assert drawn(0.3) == {1} and drawn(1.0) == {1, 2} and drawn(100.0) == {1, 2, 3}


def test_draws_follow_the_probabilities():
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    drawn = choose_tokens(LOGITS.expand(4000, -1), temperature=1.0, generators=generators)
    shares = torch.bincount(drawn, minlength=4) / 4000
    # Four standard errors of a share of 0.4 from 4,000 draws.
    torch.testing.assert_close(shares, LOGITS.exp()[0], atol=0.031, rtol=0)


def test_a_temperature_that_is_negative_or_no_number_is_refused():
    with pytest.raises(ValueError, match="temperature=-0.5"):
        choose_tokens(LOGITS, temperature=-0.5)
    for temperature, said in ((-0.5, "negative"), (math.inf, "no number"), (math.nan, "no number")):
        with pytest.raises(ValueError, match=f"temperature={temperature} is {said}"):
            Sampling(temperature)


@pytest.mark.parametrize("largest", [-1e6, -90.0, 0.0, 60.0, 1e6])
@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-38, 1e-12, 1e38, 1e300])
def test_the_coldest_and_the_hottest_draws_are_probabilities(temperature, largest):
    """In the limits: the most probable tokens alone, and every token that is not ruled out as probable as another."""
    logits = torch.tensor([[largest, largest, largest - abs(largest) / 100 - 1, -math.inf]])
    expected = [[0.5, 0.5, 0, 0]] if temperature < 1 else [[1 / 3, 1 / 3, 1 / 3, 0]]
    torch.testing.assert_close(probabilities_of(logits, temperature=temperature), torch.tensor(expected))
    drawn = choose_tokens(logits, temperature=temperature, top_p=5e-324, generators=[torch.Generator().manual_seed(0)])
    assert drawn.item() in (0, 1, 2) if temperature > 1 else drawn.item() in (0, 1)


def test_logits_that_are_no_numbers_are_said_before_anything_is_drawn():
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with pytest.raises(FloatingPointError, match="not finite"):
        choose_tokens(torch.tensor([[0.0, 1.0], [0.0, math.nan]]), temperature=1.0, generators=generators)
    again = [torch.Generator().manual_seed(i) for i in range(2)]
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, again))
