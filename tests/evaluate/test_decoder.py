"""Scoring with the real decoder: every kind of mixer, both kinds of tokenizer."""

import numpy as np
import pytest
import torch

from fusedlm.data.tokenizer import ByteTokenizer, train_bpe
from fusedlm.evaluate import score_documents, text_documents
from fusedlm.model import build_model
from fusedlm.testing import every_mixer_config, randomise_

TEXT = "Fellow citizens — naïve or not: 日本語, 🙂.\r\n  The union of these States;\n\nthe union, the states.\t" * 3
CPU = {"device": "cpu", "dtype": torch.float32}
BOUND = 1e-5
CONFIG = every_mixer_config(logit_softcap=15.0, dropout=0.5)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else train_bpe([TEXT], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return randomise_(build_model(CONFIG, vocab_size=tokenizer.vocab_size, seed=0))


@pytest.fixture(scope="module")
def documents(tokenizer):
    return [document for n in (5, 60, len(TEXT), 31) for document in text_documents(TEXT[:n], tokenizer)]


def plain_nll(model, documents, dtype=torch.float32):
    """Each full document at once under autocast, in float64 after the logits."""
    model.eval()
    total = 0.0
    for tokens, _ in documents:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(torch.tensor(tokens[None, :-1])).logits[0].double()
        total -= logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].sum().item()
    return total


def test_bytes_scored_are_the_length_of_the_text(model, tokenizer):
    documents = text_documents(TEXT, tokenizer)
    for window in (None, 32):
        score = score_documents(model, documents, window=window, **CPU)
        assert score.bytes == len(TEXT.encode()) == len(tokenizer.decode_bytes(documents[0][0]))
        assert score.tokens == len(tokenizer.encode(TEXT))


def test_full_documents_and_long_windows_agree_with_a_plain_sum(model, documents):
    expected = plain_nll(model, documents)
    assert score_documents(model, documents, window=None, **CPU).nll == pytest.approx(expected, rel=1e-5)
    longest = max(len(tokens) for tokens, _ in documents)
    assert score_documents(model, documents, window=longest, **CPU).nll == pytest.approx(expected, rel=1e-5)


def test_chunks_do_not_change_the_score(model, documents, monkeypatch):
    expected = plain_nll(model, documents)
    for chunk in (7, 100):
        monkeypatch.setattr("fusedlm.evaluate.score._CHUNK", chunk)
        assert score_documents(model, documents, window=None, **CPU).nll == pytest.approx(expected, rel=1e-5)


def test_windows_agree_with_each_scored_alone(model, documents):
    """A window is scored like a document of its tokens, less what its context alone would score."""
    window, stride = 24, 10
    expected = 0.0
    for tokens, _ in documents:
        n, first = len(tokens) - 1, 0
        for start in range(0, n, stride):
            stop = min(start + window, n)
            if stop > first:
                part = [(tokens[start : stop + 1], 1)]
                context = [(tokens[start : first + 1], 1)]
                expected += plain_nll(model, part) - (plain_nll(model, context) if first > start else 0)
                first = stop
    score = score_documents(model, documents, window=window, stride=stride, **CPU)
    assert score.nll == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_score_does_not_depend_on_the_batch(model, documents, batch_tokens):
    one = score_documents(model, documents, window=24, **CPU)
    other = score_documents(model, documents, window=24, batch_tokens=batch_tokens, **CPU)
    assert other.nll == pytest.approx(one.nll, rel=1e-6)


@pytest.mark.parametrize("window", [None, 10_000])
def test_scores_under_autocast_are_those_of_its_logits(model, documents, window):
    """Document by document: over all of them the errors of rounding may cancel."""
    differences = []
    for document in documents:
        exact, rounded = plain_nll(model, [document]), plain_nll(model, [document], torch.bfloat16)
        score = score_documents(model, [document], window=window, device="cpu", dtype=torch.bfloat16).nll
        assert score == pytest.approx(rounded, rel=BOUND)
        differences.append(abs(rounded / exact - 1))
    assert max(differences) > BOUND * 5, "too close to tell the two apart"


def test_the_head_computes_scored_tokens_alone(model, documents):
    rows = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    score = score_documents(model, documents, window=24, stride=3, **CPU)
    hook.remove()
    assert sum(rows) == score.tokens


def test_a_model_can_be_trained_after_scoring(model, documents):
    """Nothing that scoring leaves, such as cached tables, may block gradients."""
    model.train()
    score_documents(model, documents, window=24, **CPU)
    score_documents(model, documents, window=None, **CPU)
    tokens = torch.tensor(np.stack([documents[2][0][:33]]))
    model(tokens[:, :-1], targets=tokens[:, 1:]).total().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()


@pytest.mark.gpu
def test_the_gpu_agrees(model, documents):
    settings = [(None, None), (24, 10)]
    expected = [score_documents(model, documents, window=w, stride=s, **CPU).nll for w, s in settings]
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
        on_gpu = build_model(CONFIG, vocab_size=model.vocab_size, device="cuda")
        on_gpu.load_state_dict(model.state_dict())
        for (window, stride), nll in zip(settings, expected, strict=True):
            score = score_documents(on_gpu, documents, window=window, stride=stride, device="cuda", dtype=dtype)
            assert score.nll == pytest.approx(nll, rel=bound)
            assert score == score_documents(on_gpu, documents, window=window, stride=stride, device="cuda", dtype=dtype)
