"""The model's distribution with one token, guessed from the text before, made more or less likely."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedlm.evaluate.adapt.counts import NgramCounts, count_ngrams
from fusedlm.evaluate.adapt.online import BLOCK, Adagrad

_STRONGEST = 12.0  # of beta


@dataclass(frozen=True)
class HintTilt:
    """p'(v) = p(v) exp(beta [v = h]) / Z, Z = 1 + p(h) (exp(beta) - 1).

    The hint h is the token that most often followed the longest context, of at most max(orders) - 1 tokens, that was
    followed by anything in the text that was scored; without one, p' = p. beta is a linear function of the model's
    entropy and of how often and how surely the hint followed. Its coefficients, a set per order, start at zero and are
    learned by Adagrad on the log-likelihood of p', from the tokens before the current block of 64.
    """

    orders: Sequence[int] = (2, 3, 4, 5, 6, 7)
    rate: float = 0.3  # of Adagrad
    reset: bool = False  # whether each document begins with no counts; coefficients are kept

    name = "tilt"

    def settings(self) -> dict:
        return {"orders": list(self.orders), "rate": self.rate, "reset": self.reset}

    def hints(self, documents: Sequence[np.ndarray]) -> tuple[NgramCounts, np.ndarray]:
        """The counts, and the hint of each token (n,), -1 where there is none."""
        counts = count_ngrams(documents, self.orders, reset=self.reset)
        return counts, np.take_along_axis(counts.most_frequent, _longest(counts)[None], 0)[0]

    def nll(self, counts: NgramCounts, nll: np.ndarray, entropy: np.ndarray, log_hint: np.ndarray) -> np.ndarray:
        """Adapted nats of each token.

        Args:
            counts: of the text.
            nll, entropy: (n,) float64, nats of each token under the model, and the entropy of its distribution.
            log_hint: (n,) float64, log probability of the hint; anything where there is none.
        """
        order = _longest(counts)
        of_order = {
            name: np.take_along_axis(getattr(counts, name), order[None], 0)[0]
            for name in ("total", "highest", "distinct", "most_frequent", "of_target")
        }
        known = of_order["total"] > 0
        total = np.maximum(of_order["total"], 1)
        features = np.stack(
            [
                np.ones(len(nll)),
                np.log(total),
                of_order["highest"] / total,
                of_order["distinct"] / total,
                entropy / 4,
                np.where(known, log_hint, 0.0).clip(-16, 0) / 4,
            ],
            1,
        )
        hit = known & (counts.target == of_order["most_frequent"])
        learned = Adagrad(np.zeros((len(counts.orders), features.shape[1])), self.rate)
        adapted = np.empty(len(nll))
        chance = np.where(known, np.exp(log_hint), 0.0)
        for first in range(0, len(nll), BLOCK):
            part = slice(first, first + BLOCK)
            beta = (features[part] * learned.weights[order[part]]).sum(1).clip(-_STRONGEST, _STRONGEST)
            z = 1 + chance[part] * np.expm1(beta)
            adapted[part] = nll[part] - hit[part] * beta + np.log(z)
            slope = hit[part] - chance[part] * np.exp(beta) / z
            gradient = np.zeros_like(learned.weights)
            np.add.at(gradient, order[part], (slope * known[part])[:, None] * features[part])
            learned.step(gradient)
        return adapted


def _longest(counts: NgramCounts) -> np.ndarray:
    """(n,) the index of the highest order whose context is known; 0 if none is."""
    known = counts.total > 0
    return np.where(known.any(0), len(known) - 1 - known[::-1].argmax(0), 0)
