"""Weights that are learned while a text is scored, from the tokens that were scored already."""

import numpy as np

BLOCK = 64  # tokens that are scored with the same weights, before these learn from them


class Adagrad:
    """Gradient ascent with a rate per weight that falls with its squared gradients (Duchi et al., 2011)."""

    def __init__(self, start: np.ndarray, rate: float):
        """start: weights of any shape, float64."""
        self.weights = start.astype(np.float64)
        self._rate, self._squares = rate, np.zeros(start.shape)

    def step(self, gradient: np.ndarray) -> None:
        """gradient: of what becomes higher, in the shape of the weights."""
        self._squares += gradient**2
        self.weights += self._rate * gradient / np.sqrt(self._squares + 1e-8)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
