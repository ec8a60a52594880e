"""Counts of n-grams, the mixture and the tilt against plain loops over dictionaries."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from fusedlm.evaluate.adapt import HintTilt, NgramMixture, count_ngrams
from fusedlm.evaluate.adapt.online import BLOCK

VOCAB = 7


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    return [np.array([6, *generator.integers(0, 4, n)]) for n in (0, 30, 1, 5, 40, 0, 160)]


def walk(documents, order, reset):
    """Before each token: the counts of what followed its context, or None, and the token that leads them."""
    seen, leads = defaultdict(Counter), {}
    for tokens in documents:
        if reset:
            seen, leads = defaultdict(Counter), {}
        for j in range(1, len(tokens)):
            context = tuple(tokens[j - order + 1 : j].tolist()) if j >= order - 1 else None
            token = int(tokens[j])
            yield token, Counter(seen[context]) if context is not None else Counter(), leads.get(context, -1)
            if context is not None:
                seen[context][token] += 1
                if seen[context][token] == max(seen[context].values()):
                    leads[context] = token


@pytest.mark.parametrize("reset", [False, True])
def test_counts_are_those_of_dictionaries(documents, reset):
    found = count_ngrams(documents, (1, 2, 3, 5, 7), reset=reset)
    assert found.target.tolist() == np.concatenate([tokens[1:] for tokens in documents]).tolist()
    for i, order in enumerate(found.orders):
        for t, (token, seen, lead) in enumerate(walk(documents, order, reset)):
            expected = (sum(seen.values()), len(seen), max(seen.values(), default=0), lead, seen[token])
            arrays = (found.total, found.distinct, found.highest, found.most_frequent, found.of_target)
            assert tuple(int(a[i, t]) for a in arrays) == expected


def test_ids_do_not_collide():
    """A wide vocabulary and many n-grams: every count of a text without repeated pairs is zero."""
    tokens = np.arange(2**24 - 3000, 2**24)
    found = count_ngrams([tokens], (2, 7))
    assert found.total.sum() == found.of_target.sum() == 0 and (found.most_frequent == -1).all()


def test_nothing_to_count():
    for documents in ([], [np.array([6])], [np.array([6, 1])]):
        found = count_ngrams(documents, (2, 3))
        assert found.total.shape == (2, sum(len(tokens) - 1 for tokens in documents)) and found.total.sum() == 0


@pytest.mark.parametrize("orders", [(), (0, 2), (3, 2), (2, 2)])
def test_orders_are_checked(orders):
    with pytest.raises(ValueError, match="orders="):
        count_ngrams([np.array([6, 1])], orders)


def model_of(documents, seed=0):
    """A distribution for each token, the nats of the token and the entropy."""
    generator = np.random.default_rng(seed)
    targets = np.concatenate([tokens[1:] for tokens in documents])
    p = generator.dirichlet(np.full(VOCAB, 0.5), len(targets)) + 1e-9
    p /= p.sum(1, keepdims=True)
    return p, -np.log(p[np.arange(len(targets)), targets]), -(p * np.log(p)).sum(1)


def adagrad(weights, squares, gradient, rate):
    squares += gradient**2
    weights += rate * gradient / np.sqrt(squares + 1e-8)


def test_the_mixture_is_its_definition(documents):
    """Whole distributions, token by token; gradients of the block's log-likelihood by finite differences."""
    method = NgramMixture(orders=(2, 3, 4), rate=0.3, start=-1.0)
    p, nll, entropy = model_of(documents)
    counts, hints = method.hints(documents)
    found = method.nll(counts, nll, entropy)
    assert hints is None
    walks = [list(walk(documents, order, False)) for order in method.orders]
    weights, squares = np.zeros((3, 5)), np.zeros((3, 5))
    weights[:, 0] = -1.0

    def distribution(t, weights):
        q = p[t].copy()
        for of_order, w in zip(walks, weights, strict=True):
            _, seen, _ = of_order[t]
            if total := sum(seen.values()):
                f = [1.0, math.log(total), max(seen.values()) / total, len(seen) / total, entropy[t] / 4]
                mix = 1 / (1 + math.exp(-float(w @ f)))
                q = (1 - mix) * q + mix * np.array([seen[v] / total for v in range(VOCAB)])
        return q

    targets = counts.target
    for first in range(0, len(nll), BLOCK):
        block = range(first, min(first + BLOCK, len(nll)))
        for t in block:
            q = distribution(t, weights)
            assert q.sum() == pytest.approx(1, abs=1e-12)
            assert found[t] == pytest.approx(-math.log(q[targets[t]]), abs=1e-6)
        gradient = np.zeros_like(weights)
        for index in np.ndindex(weights.shape):
            step = np.zeros_like(weights)
            step[index] = 1e-5
            ends = [sum(math.log(distribution(t, weights + s)[targets[t]]) for t in block) for s in (step, -step)]
            gradient[index] = (ends[0] - ends[1]) / 2e-5
        adagrad(weights, squares, gradient, 0.3)
    assert not np.allclose(weights[:, 1:], 0)


def test_the_tilt_is_its_definition(documents):
    method = HintTilt(orders=(2, 3, 4), rate=0.3)
    p, nll, entropy = model_of(documents)
    counts, hints = method.hints(documents)
    log_hint = np.log(p[np.arange(len(hints)), hints])
    found = method.nll(counts, nll, entropy, log_hint)
    walks = [list(walk(documents, order, False)) for order in method.orders]
    weights, squares = np.zeros((3, 6)), np.zeros((3, 6))
    targets = counts.target

    def distribution(t, weights):
        for k in (2, 1, 0):
            _, seen, hint = walks[k][t]
            if total := sum(seen.values()):
                assert hint == hints[t]
                guess = max(math.log(p[t, hint]), -16) / 4
                f = [1.0, math.log(total), max(seen.values()) / total, len(seen) / total, entropy[t] / 4, guess]
                q = p[t].copy()
                q[hint] *= math.exp(float(weights[k] @ f))
                return q / q.sum()
        assert hints[t] == -1
        return p[t]

    for first in range(0, len(nll), BLOCK):
        block = range(first, min(first + BLOCK, len(nll)))
        for t in block:
            assert found[t] == pytest.approx(-math.log(distribution(t, weights)[targets[t]]), abs=1e-6)
        gradient = np.zeros_like(weights)
        for index in np.ndindex(weights.shape):
            step = np.zeros_like(weights)
            step[index] = 1e-5
            ends = [sum(math.log(distribution(t, weights + s)[targets[t]]) for t in block) for s in (step, -step)]
            gradient[index] = (ends[0] - ends[1]) / 2e-5
        adagrad(weights, squares, gradient, 0.3)
    assert not np.allclose(weights, 0)


def test_probabilities_that_underflow_stay_finite(documents):
    counts, _ = NgramMixture().hints(documents)
    n = counts.total.shape[1]
    found = NgramMixture().nll(counts, np.full(n, 5000.0), np.full(n, 1.0))
    new = ~(counts.of_target > 0).any(0)
    assert np.isfinite(found).all() and (found[new] >= 5000).all() and (found[~new] < 100).all()
    counts, hints = HintTilt().hints(documents)
    found = HintTilt().nll(counts, np.full(n, 5000.0), np.full(n, 1.0), np.where(hints >= 0, -5000.0, 0.0))
    assert np.isfinite(found).all()


def test_repetition_is_learned():
    """A model without a clue, on a text that repeats itself."""
    text = np.tile(np.random.default_rng(0).integers(0, 50, 40), 50)
    documents, n = [np.array([50, *text])], len(text)
    nll, entropy = np.full(n, math.log(51)), np.full(n, math.log(51))
    for method in (NgramMixture(), HintTilt()):
        context, hints = method.hints(documents)
        found = method.nll(context, nll, entropy, None if hints is None else nll * -1)
        assert found[-200:].mean() < 1.0 < math.log(51)
