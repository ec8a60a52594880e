"""The peer of benchmarks/nanogpt.py in miniature."""

import numpy as np
import pytest
import torch

from benchmarks.nanogpt import GPT, Scored, learning_rate
from fusedlm.evaluate import score_documents


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(50, 16, 2, 32, 4, 0.0)


def test_its_score_is_its_loss(model):
    tokens = torch.randint(50, (1, 13))
    with torch.no_grad():
        model.embedding.weight[50:] = 5.0  # padding of the vocabulary, which scores leave out
        logits = model.hidden(tokens[:, :-1]) @ model.embedding.weight[:50].T
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
    where = {"device": "cpu", "dtype": torch.float32}
    score = score_documents(Scored(model, 50), [(tokens[0].numpy().astype(np.int64), 12)], window=16, **where)
    assert score.nll == pytest.approx(expected, rel=1e-5) and score.tokens == 12


def test_it_is_causal(model):
    tokens = torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 50
    before, after = model.eval().hidden(tokens), model.hidden(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_schedule():
    assert [learning_rate(1.0, done) for done in (0.0, 0.005, 0.01, 1.0, 1.1)] == pytest.approx([0, 0.5, 1, 0.1, 0.1])
    assert learning_rate(2.0, 0.505) == pytest.approx(1.1)
