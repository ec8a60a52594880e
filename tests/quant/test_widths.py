"""The choice of widths by a byte budget."""

import itertools
import random

import pytest

from fusedlm.quant.widths import Option, choose_options


def _random_options(rng, n, convex):
    tables = {}
    for i in range(n):
        size, scale = rng.randint(5, 200), rng.uniform(0.1, 100)
        jitter = 0 if convex else 0.5
        tables[f"m{i}"] = [
            Option(bits, bits * size + 3, scale * 4.0**-bits * rng.uniform(1 - jitter, 1 + jitter))
            for bits in range(2, 9)
        ]
    return tables


def _total(chosen):
    return sum(option.n_bytes for option in chosen.values()), sum(option.error for option in chosen.values())


@pytest.mark.parametrize("convex", [True, False])
def test_it_fits_and_nothing_that_fits_is_better_by_one_step(convex):
    rng = random.Random(0)
    for _ in range(50):
        options = _random_options(rng, rng.randint(1, 12), convex)
        least = sum(own[0].n_bytes for own in options.values())
        most = sum(own[-1].n_bytes for own in options.values())
        budget = rng.randint(least, most + 10)
        chosen = choose_options(options, budget)
        n_bytes, _ = _total(chosen)
        assert n_bytes <= budget
        for name, own in options.items():
            for option in own:
                if option.error < chosen[name].error:
                    assert n_bytes - chosen[name].n_bytes + option.n_bytes > budget


def test_it_is_near_the_best_of_all():
    rng = random.Random(1)
    for _ in range(20):
        options = _random_options(rng, 4, convex=True)
        budget = sum(own[0].n_bytes for own in options.values()) + rng.randint(0, 1200)
        every = itertools.product(*options.values())
        best = min(sum(o.error for o in some) for some in every if sum(o.n_bytes for o in some) <= budget)
        hull_end = sum(own[-1].n_bytes for own in options.values())
        found = _total(choose_options(options, budget))[1]
        assert best <= found * (1 + 1e-12) and (found <= 2.5 * best or budget >= hull_end)


def test_it_beats_a_uniform_width_of_the_same_bytes():
    rng = random.Random(2)
    for bits in (3, 4, 5, 6):
        options = _random_options(rng, 10, convex=True)
        uniform = {name: own[bits - 2] for name, own in options.items()}
        n_bytes, error = _total(uniform)
        assert _total(choose_options(options, n_bytes))[0] <= n_bytes
        assert _total(choose_options(options, n_bytes))[1] < 0.95 * error


def test_budgets_to_the_byte():
    options = {"a": [Option(2, 10, 4.0), Option(3, 15, 1.0)], "b": [Option(2, 10, 3.0), Option(3, 16, 1.0)]}
    assert _total(choose_options(options, 31)) == (31, 2.0)
    assert _total(choose_options(options, 30)) == (25, 4.0)
    assert _total(choose_options(options, 26)) == (25, 4.0)
    assert {name: o.key for name, o in choose_options(options, 24).items()} == {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="the smallest widths take 20 bytes, 1 more than 19"):
        choose_options(options, 19)


def test_dominated_options_are_never_taken():
    options = {
        "a": [Option("small", 5, 9.0), Option("worse", 8, 9.5), Option("good", 8, 2.0), Option("large", 20, 2.0)]
    }
    assert choose_options(options, 100)["a"].key == "good"
    assert choose_options(options, 7)["a"].key == "small"


def test_a_step_that_pays_only_with_the_next_one_waits():
    """Beside the hull: 3 bits save little, 4 much for 2 bytes more, together less per byte than those of b."""
    a = [Option(2, 10, 10.0), Option(3, 20, 9.0), Option(4, 22, 1.0)]
    b = [Option(2, 10, 15.0), Option(3, 22, 3.0)]
    assert {name: o.key for name, o in choose_options({"a": a, "b": b}, 32).items()} == {"a": 2, "b": 3}
    # What is beside the hull is taken where nothing else fits.
    assert choose_options({"a": a}, 21)["a"].key == 3
