"""Sliding windows over long documents and over a whole text, against plain loops in float64."""

import numpy as np
import pytest
import torch

from fusedlm.evaluate import NotFinite, score_documents
from fusedlm.evaluate.adapt.predictions import Sequences, predict
from fusedlm.evaluate.windows import join_documents
from fusedlm.model import build_model
from fusedlm.testing import every_mixer_config, randomise_

VOCAB = 31
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}  # no autocast: the model computes in float64


@pytest.fixture(scope="module")
def model():
    return randomise_(build_model(every_mixer_config(logit_softcap=15.0), vocab_size=VOCAB, seed=0)).double().eval()


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, VOCAB - 1, n) for n in (70, 3, 0, 0, 41, 1)]
    return [(np.array([VOCAB - 1, *text]), len(text)) for text in texts]


def plain_loop(model, sequences, window, stride):
    """Nats of each token that is scored, window after window from an empty state, each token with its first window."""
    nll = []
    for tokens, targets in sequences:
        known, start = 0, 0
        while known < len(targets):
            stop = min(start + window, len(targets))
            with torch.no_grad():
                log_p = model(torch.tensor(tokens[None, start:stop])).logits[0].log_softmax(-1)
            for i in range(known, stop):
                assert i - start >= min(i, window - stride), "a token has less context than promised"
                if targets[i] != -100:
                    nll.append(-log_p[i - start, targets[i]].item())
            known, start = stop, start + stride
    return np.array(nll)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("window,stride", [(32, 8), (32, 32), (24, 1), (17, 5), (500, 64)])
def test_windows_are_a_plain_loop(model, documents, window, stride, across):
    texts = [tokens for tokens, _ in documents]
    sequences = [join_documents(texts)] if across else [(tokens, tokens[1:]) for tokens in texts]
    expected = plain_loop(model, sequences, window, stride)
    spans = {"window": window, "stride": stride, "batch_tokens": 100}
    score = score_documents(model, documents, across_documents=across, **spans, **CPU)
    assert score.nll == pytest.approx(expected.sum(), rel=1e-12)
    assert (score.tokens, score.bytes, score.documents) == (115, 115, 6)
    found = predict(model, Sequences.of(texts, across), None, **spans, **CPU, progress=None)
    assert np.allclose(found.nll, expected, rtol=1e-11)


def test_across_documents_the_context_is_the_text_before(model, documents):
    """With stride 1 and a window as long as the text, the nats are those of one sequence with end-of-text in it."""
    joined = np.concatenate([tokens for tokens, _ in documents])
    with torch.no_grad():
        log_p = model(torch.tensor(joined[None, :-1])).logits[0].log_softmax(-1)
    nll = -log_p[np.arange(len(joined) - 1), joined[1:]].numpy()
    expected = nll[joined[1:] != VOCAB - 1].sum()
    score = score_documents(model, documents, window=1000, stride=1, across_documents=True, **CPU)
    assert score.nll == pytest.approx(expected, rel=1e-12)
    alone = score_documents(model, documents, window=1000, stride=1, **CPU)
    assert abs(alone.nll / score.nll - 1) > 1e-6


def test_entropy_and_hints_are_those_of_the_distribution(model, documents):
    texts, hints = [documents[0][0]], np.arange(70) % VOCAB - 1
    spans = {"window": 100, "stride": 100, "batch_tokens": 1000}
    found = predict(model, Sequences.of(texts, False), hints, **spans, **CPU, progress=None)
    with torch.no_grad():
        log_p = model(torch.tensor(texts[0][None, :-1])).logits[0].log_softmax(-1).numpy()
    assert np.allclose(found.entropy, -(np.exp(log_p) * log_p).sum(1), rtol=1e-12)
    some = hints >= 0
    assert np.allclose(found.log_hint[some], log_p[np.arange(70), hints][some], rtol=1e-12)


def test_documents_that_are_joined(model, documents):
    tokens, targets = join_documents([tokens for tokens, _ in documents])
    assert len(tokens) == 121 and len(targets) == 120
    assert ((targets == tokens[1:]) | (targets == -100)).all() and (targets != -100).sum() == 115
    assert (tokens[1:][targets == -100] == VOCAB - 1).all()
    with pytest.raises(ValueError, match="across_documents"):
        score_documents(model, documents, window=None, across_documents=True, **CPU)
    with pytest.raises(ValueError, match="no text"):
        score_documents(model, [], window=8, across_documents=True, **CPU)


def test_a_text_that_is_not_finite_is_named(documents):
    model = build_model(every_mixer_config(), vocab_size=VOCAB).eval()
    with torch.no_grad():
        model.head.norm.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="^the text: the likelihood"):
        score_documents(model, documents, window=8, across_documents=True, **CPU)
    with pytest.raises(NotFinite, match="^document 0: the likelihood"):
        predict(
            model, Sequences.of([documents[0][0]], False), None,
            window=8, stride=8, batch_tokens=100, **CPU, progress=None,
        )  # fmt: skip
