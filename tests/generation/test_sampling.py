"""Distributions worked out by hand, and draws from them."""

import math

import pytest
import torch

from fusedlm.generation import next_token_probabilities, sample


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def assert_probabilities(got, *expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_plain_softmax():
    assert_probabilities(next_token_probabilities(logits_of(0.1, 0.6, 0.3)), 0.1, 0.6, 0.3)


def test_temperature_is_a_power_of_the_probabilities():
    assert_probabilities(next_token_probabilities(logits_of(0.2, 0.8), temperature=0.5), 0.04 / 0.68, 0.64 / 0.68)
    assert_probabilities(next_token_probabilities(logits_of(0.2, 0.8), temperature=2.0), 1 / 3, 2 / 3)


def test_temperature_zero_and_tiny_temperatures_take_the_most_likely():
    for temperature in (0, 0.0, 5e-324, 1e-30):
        got = next_token_probabilities(logits_of(0.3, 0.4, 0.3), temperature)
        assert_probabilities(got, 0, 1, 0)


def test_temperature_zero_takes_the_lower_of_two_equal_ids():
    assert_probabilities(next_token_probabilities(logits_of(0.2, 0.4, 0.4), 0), 0, 1, 0)


def test_top_k_keeps_the_most_likely_and_their_proportions():
    assert_probabilities(next_token_probabilities(logits_of(0.1, 0.4, 0.2, 0.3), top_k=2), 0, 4 / 7, 0, 3 / 7)


def test_top_k_keeps_k_of_equals():
    assert_probabilities(next_token_probabilities(torch.zeros(4), top_k=2), 0.5, 0.5, 0, 0)


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert_probabilities(next_token_probabilities(logits_of(0.25, 0.75), top_k=50), 0.25, 0.75)


@pytest.mark.parametrize(
    "top_p,expected",
    [
        (1.0, (0.125, 0.5, 0.125, 0.25)),
        (0.8, (1 / 7, 4 / 7, 0, 2 / 7)),
        (0.75, (0, 2 / 3, 0, 1 / 3)),
        (0.5, (0, 1, 0, 0)),
        (1e-9, (0, 1, 0, 0)),
    ],
)
def test_top_p_is_the_smallest_set_that_reaches_it(top_p, expected):
    assert_probabilities(next_token_probabilities(logits_of(0.125, 0.5, 0.125, 0.25), top_p=top_p), *expected)


def test_top_p_is_of_the_mass_that_top_k_leaves():
    got = next_token_probabilities(logits_of(0.375, 0.125, 0.5), top_k=2, top_p=0.6)
    assert_probabilities(got, 3 / 7, 0, 4 / 7)
    assert_probabilities(next_token_probabilities(logits_of(0.375, 0.125, 0.5), top_k=2, top_p=0.5), 0, 0, 1)


def test_impossible_tokens_stay_impossible():
    got = next_token_probabilities(torch.tensor([0.0, -math.inf, 0.0]), top_k=3, top_p=1.0)
    assert_probabilities(got, 0.5, 0, 0.5)
    generator = torch.Generator().manual_seed(0)
    assert {sample(got, generator) for _ in range(200)} == {0, 2}


def test_half_precision_logits():
    got = next_token_probabilities(torch.tensor([100.0, 100.0], dtype=torch.bfloat16))
    assert_probabilities(got, 0.5, 0.5)


@pytest.mark.parametrize("logits", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_not_finite_are_an_error(logits):
    with pytest.raises(ValueError, match="not finite"):
        next_token_probabilities(torch.tensor(logits))


def test_draws_follow_the_distribution():
    probabilities = next_token_probabilities(logits_of(0.05, 0.2, 0.4, 0.35), top_k=3)
    generator = torch.Generator().manual_seed(1)
    n = 4000
    counts = torch.bincount(torch.tensor([sample(probabilities, generator) for _ in range(n)]), minlength=4)
    expected = n * probabilities
    assert counts[0] == 0
    # Chi-squared with 2 degrees of freedom exceeds 13.8 for one seed in a thousand; the seed is fixed.
    assert (((counts - expected) ** 2)[1:] / expected[1:]).sum() < 13.8


def test_a_seed_gives_the_same_draws():
    probabilities = torch.full((50,), 0.02, dtype=torch.float64)

    def draws(seed):
        generator = torch.Generator().manual_seed(seed)
        return [sample(probabilities, generator) for _ in range(20)]

    assert draws(7) == draws(7) != draws(8)
