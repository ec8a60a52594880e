"""The model's distribution interpolated with the relative frequencies of n-grams in the text before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedlm.evaluate.adapt.counts import NgramCounts, count_ngrams
from fusedlm.evaluate.adapt.online import BLOCK, Adagrad, sigmoid

_SURE = 12.0  # largest logit of a weight: the model keeps at least exp(-12) of each order


@dataclass(frozen=True)
class NgramMixture:
    """p_1 is the model's distribution, and order by order from the lowest to the highest

        p_k(v) = (1 - w_k) p_{k-1}(v) + w_k c_k(v) / sum_u c_k(u)

    with c_k(v) how often token v followed the k - 1 tokens before it in the text that was scored (interpolation as of
    Jelinek and Mercer, 1980). Where they were never followed by anything, w_k is 0. Each p_k is a distribution over the
    vocabulary, since p_{k-1} and the frequencies are.

    w_k is the sigmoid of a linear function of the model's entropy and of how often and how surely the context was
    followed by one token. Its coefficients, a set per order, are learned by Adagrad on the log-likelihood of the
    mixture, from the tokens before the current block of 64.
    """

    orders: Sequence[int] = (2, 3, 4, 5, 6, 7)
    rate: float = 0.2  # of Adagrad
    start: float = -3.0  # logit of every weight before anything is learned
    reset: bool = False  # whether each document begins with no counts; coefficients are kept

    name = "ngram"

    def settings(self) -> dict:
        return {"orders": list(self.orders), "rate": self.rate, "start": self.start, "reset": self.reset}

    def hints(self, documents: Sequence[np.ndarray]) -> tuple[NgramCounts, None]:
        """The counts, and no tokens whose probability is needed."""
        return count_ngrams(documents, self.orders, reset=self.reset), None

    def nll(self, counts: NgramCounts, nll: np.ndarray, entropy: np.ndarray, log_hint: None = None) -> np.ndarray:
        """Adapted nats of each token.

        Args:
            counts: of the text.
            nll, entropy: (n,) float64, nats of each token under the model, and the entropy of its distribution.
        """
        known = counts.total > 0
        frequency = counts.of_target / np.maximum(counts.total, 1)
        features = _features(counts, entropy)
        start = np.zeros((len(self.orders), features.shape[-1]))
        start[:, 0] = self.start
        learned = Adagrad(start, self.rate)
        model, adapted = np.exp(-nll), np.empty(len(nll))
        for first in range(0, len(nll), BLOCK):
            part = slice(first, first + BLOCK)
            adapted[part], gradient = _block(
                learned.weights, model[part], nll[part], frequency[:, part], known[:, part], features[:, part]
            )
            learned.step(gradient)
        return adapted


def _features(counts: NgramCounts, entropy: np.ndarray) -> np.ndarray:
    """(orders, n, 5), of a context that was followed by something."""
    total = np.maximum(counts.total, 1)
    features = np.empty((*counts.total.shape, 5))
    features[..., 0] = 1.0
    features[..., 1] = np.log(total)
    features[..., 2] = counts.highest / total
    features[..., 3] = counts.distinct / total
    features[..., 4] = entropy / 4
    return features


def _block(weights, model, nll, frequency, known, features) -> tuple[np.ndarray, np.ndarray]:
    """Adapted nats of a block, and the gradient of its log-likelihood with respect to the weights."""
    logits = np.einsum("ktf,kf->kt", features, weights).clip(-_SURE, _SURE)
    mix = sigmoid(logits) * known
    before, p = np.empty_like(mix), model
    for k in range(len(mix)):
        before[k] = p
        p = p + mix[k] * (frequency[k] - p)
    gradient, later = np.empty_like(weights), np.ones_like(p)
    safe = np.maximum(p, np.finfo(np.float64).tiny)
    for k in reversed(range(len(mix))):
        slope = (frequency[k] - before[k]) * later / safe * mix[k] * (1 - mix[k])
        gradient[k] = slope @ features[k]
        later = later * (1 - mix[k])
    # Where no n-gram has the token, the model's probability is scaled, which must not underflow.
    adapted = np.where(frequency.any(0), -np.log(safe), nll - np.log1p(-mix).sum(0))
    return adapted, gradient
