"""A model whose probabilities are known in closed form, and texts as documents."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fusedlm.model.output import Output

VOCAB = 7


class _State:
    def __init__(self, batch_size):
        self.total = torch.zeros(batch_size, dtype=torch.long)


class History(nn.Module):
    """The next token's logits depend on the last token and on the sum of all tokens seen, so that a token outside a
    window or missing from a state changes the score."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.last = torch.randn(VOCAB, VOCAB, generator=generator)
        self.seen = torch.randn(5, VOCAB, generator=generator)
        self.vocab_size = VOCAB
        self.shapes = []  # of tokens, per call
        self.predicted = []  # number of predictions, per call

    def init_state(self, batch_size, max_tokens=None):
        return _State(batch_size)

    def forward(self, tokens, *, documents=None, state=None, select=None, targets=None):
        assert not torch.is_grad_enabled() and not self.training
        self.shapes.append(tuple(tokens.shape))
        total = tokens.cumsum(1)
        if state is not None:
            total = total + state.total[:, None]
            state.total = total[:, -1]
        logits = self.last[tokens] + self.seen[total % 5]
        if select is not None:
            logits = logits.flatten(0, 1)[select]
        self.predicted.append(logits.shape[:-1].numel())
        nll = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        return Output(None, nll.view(targets.shape), {}, {})

    def nll(self, inputs, target):
        """Of one token after the inputs, by the definition and in Python floats."""
        logits = [
            a + b for a, b in zip(self.last[inputs[-1]].tolist(), self.seen[sum(inputs) % 5].tolist(), strict=True)
        ]
        return math.log(sum(math.exp(x) for x in logits)) - logits[target]


@pytest.fixture
def model():
    return History()


@pytest.fixture
def documents():
    """Lengths around the windows of the tests, one document without text; every token is two bytes."""
    generator = np.random.default_rng(0)
    lengths = [1, 40, 0, 7, 8, 9, 23, 100, 3]
    return [(np.array([6, *generator.integers(0, 6, n)], dtype=np.uint16), 2 * n) for n in lengths]
