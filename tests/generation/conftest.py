"""A model with a state whose next-token logits are known in closed form, and a byte tokenizer."""

import numpy as np
import pytest
import torch
from torch import nn

from fusedlm.model.output import Output

EOT = 256


class _State:
    def __init__(self, batch_size):
        self.lengths = [0] * batch_size
        self.totals = torch.zeros(batch_size, dtype=torch.int64)


class History(nn.Module):
    """The next token's logits depend on the last token and on the sum of all tokens of the row; the model has 320 ids,
    the tokenizer 257."""

    def __init__(self):
        super().__init__()
        self.vocab_size = 320
        generator = torch.Generator().manual_seed(0)
        self.last = torch.randn(320, 320, generator=generator)
        self.seen = torch.randn(11, 320, generator=generator)
        self.last[:, EOT] = -1e9
        self.fed = []  # per call, the new tokens of each row

    def init_state(self, batch_size, max_tokens=None):
        self.max_tokens = max_tokens
        return _State(batch_size)

    def forward(self, tokens, *, documents=None, state=None, lengths=None, select=None, targets=None):
        assert targets is None and not torch.is_grad_enabled() and not self.training
        lengths = [tokens.shape[1]] * len(tokens) if lengths is None else lengths
        self.fed.append([row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)])
        logits = self.next(tokens, state, lengths)
        return Output(logits if select is None else logits.flatten(0, 1)[select], None, {}, {})

    def next(self, tokens, state, lengths):
        valid = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
        total = (tokens * valid).cumsum(1)
        if state is not None:
            total = total + state.totals[:, None]
            state.totals = total[:, -1]
            state.lengths = [before + new for before, new in zip(state.lengths, lengths, strict=True)]
            assert max(state.lengths) <= self.max_tokens
        return self.last[tokens] + self.seen[total % 11]


class Scripted(History):
    """Predicts the given bytes one by one, whatever it reads, then end-of-text."""

    def __init__(self, script):
        super().__init__()
        self.script = [*script, EOT]
        self.said = 0

    def next(self, tokens, state, lengths):
        logits = torch.zeros(*tokens.shape, 320)
        logits[:, -1, self.script[self.said]] = 100.0
        self.said += 1
        return logits


class Bytes:
    vocab_size, eot_id = 257, EOT

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i != EOT)

    def unused_ids(self, limit):
        return np.arange(self.vocab_size, limit)


@pytest.fixture
def model():
    return History()


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def tokenizer():
    return Bytes()
