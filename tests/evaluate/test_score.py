"""Scores against plain loops, budgets, arguments and damaged input."""

import math

import numpy as np
import pytest
import torch

from fusedlm.evaluate import Score, score_documents

CPU = {"device": "cpu", "dtype": torch.float32}


def sliding_nll(model, documents, window, stride):
    """Window by window and token by token, marking what has been scored."""
    total = 0.0
    for tokens, _ in documents:
        tokens = tokens.tolist()
        scored = set()
        for start in range(0, max(len(tokens) - 1, 0), stride):
            for i in range(start, min(start + window, len(tokens) - 1)):
                if i not in scored:
                    scored.add(i)
                    total += model.nll(tokens[start : i + 1], tokens[i + 1])
        assert scored == set(range(len(tokens) - 1))
    return total


def test_full_documents_agree_with_a_plain_loop(model, documents):
    score = score_documents(model, documents, window=None, **CPU)
    assert score.nll == pytest.approx(sliding_nll(model, documents, 10**6, 10**6), rel=1e-6)
    assert (score.tokens, score.bytes, score.documents) == (191, 382, 9)


@pytest.mark.parametrize("window,stride", [(1, 1), (8, 8), (8, 3), (9, 1), (16, 15), (64, 32), (99, 99), (100, 1)])
def test_sliding_windows_agree_with_a_plain_loop(model, documents, window, stride):
    score = score_documents(model, documents, window=window, stride=stride, **CPU)
    assert score.nll == pytest.approx(sliding_nll(model, documents, window, stride), rel=1e-6)
    assert (score.tokens, score.bytes, score.documents) == (191, 382, 9)


def test_a_window_as_long_as_the_document_scores_the_full_document(model, documents):
    full = score_documents(model, documents, window=None, **CPU)
    windowed = score_documents(model, documents, window=100, stride=1, **CPU)
    assert windowed.nll == pytest.approx(full.nll, rel=1e-12)


def test_stride_defaults_to_half_a_window(model, documents):
    default = score_documents(model, documents, window=9, **CPU)
    assert default == score_documents(model, documents, window=9, stride=4, **CPU)
    assert default != score_documents(model, documents, window=9, stride=5, **CPU)


@pytest.mark.parametrize("batch_tokens", [1, 17, 64, 10**6])
def test_score_does_not_depend_on_the_batch(model, documents, batch_tokens):
    one = score_documents(model, documents, window=16, stride=5, batch_tokens=64, **CPU)
    model.shapes.clear()
    other = score_documents(model, documents, window=16, stride=5, batch_tokens=batch_tokens, **CPU)
    assert other.nll == pytest.approx(one.nll, rel=1e-12)
    assert all(rows * width <= batch_tokens or rows == 1 for rows, width in model.shapes)


def test_scoring_twice_gives_the_same_bits(model, documents):
    for window in (None, 16):
        first = score_documents(model, documents, window=window, **CPU)
        assert score_documents(model, documents, window=window, **CPU) == first


def test_a_long_document_goes_through_the_state_in_bounded_chunks(model):
    tokens = np.arange(10_001) % 6
    score = score_documents(model, [(tokens, 10_000)], window=None, **CPU)
    assert score.tokens == 10_000
    widths = [width for _, width in model.shapes]
    seen = np.cumsum([0, *widths])
    assert max(widths) <= 2048 and (widths * seen[:-1]).max() <= 2**22
    assert score.nll == pytest.approx(score_documents(model, [(tokens, 10_000)], window=10_000, **CPU).nll, rel=1e-12)


def test_context_and_padding_are_not_predicted(model, documents):
    score_documents(model, documents, window=16, stride=2, **CPU)
    assert sum(model.predicted) == 191 < sum(rows * width for rows, width in model.shapes) / 4


def test_sums_are_in_float64(model):
    """A running sum of this many terms in float32 would be off by more than 1e-5."""
    model.last.zero_()
    model.seen.zero_()
    score = score_documents(model, [(np.zeros(200_001, dtype=np.int64), 1)], window=1000, stride=1000, **CPU)
    assert score.nll == pytest.approx(200_000 * math.log(7), rel=1e-7)


@pytest.mark.parametrize("window", [8, 33, 10**8])
def test_no_window_is_padded_beyond_the_longest_document(model, documents, window):
    expected = score_documents(model, documents, window=min(window, 100), stride=1, **CPU)
    for source, longest in ((documents, None), (iter(documents), 100)):
        model.shapes.clear()
        score = score_documents(model, source, window=window, stride=1, longest=longest, batch_tokens=400, **CPU)
        assert max(width for _, width in model.shapes) <= min(window, 100)
        assert score.nll == pytest.approx(expected.nll, rel=1e-12) and score.tokens == 191
    assert len(model.shapes) < 191


def test_a_document_longer_than_stated_is_refused(model, documents):
    with pytest.raises(ValueError, match="document 7: it has 100 tokens, more than longest=99"):
        score_documents(model, iter(documents), window=8, longest=99, **CPU)


def test_the_model_keeps_its_mode(model, documents):
    for training in (True, False):
        model.train(training)
        score_documents(model, documents, window=8, **CPU)
        assert model.training is training
    model.train()
    with pytest.raises(ValueError):
        score_documents(model, [], window=8, **CPU)
    assert model.training


def test_progress_counts_tokens(model, documents):
    for window in (None, 8):
        seen = []
        score_documents(model, documents, window=window, batch_tokens=32, progress=seen.append, **CPU)
        assert seen == sorted(seen) and seen[-1] == 191 and len(seen) > 2


def test_units():
    score = Score(nll=8 * math.log(2), tokens=2, bytes=4, documents=1)
    assert score.bpb == 2.0
    assert score.nll_per_token == pytest.approx(4 * math.log(2))


@pytest.mark.parametrize(
    "arguments,word",
    [
        ({"window": 8, "stride": 9}, "stride=9"),
        ({"window": 8, "stride": 0}, "stride=0"),
        ({"window": None, "stride": 4}, "stride=4"),
        ({"window": 0}, "window=0"),
        ({"window": -3}, "window=-3"),
        ({"window": 8, "batch_tokens": 0}, "batch_tokens=0"),
    ],
)
def test_impossible_arguments_are_named(model, documents, arguments, word):
    with pytest.raises(ValueError, match=word) as caught:
        score_documents(model, documents, **arguments, **CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "documents,word",
    [
        ([], "no text"),
        ([(np.array([6]), 0)], "no text"),
        ([(np.array([], dtype=np.int64), 0)], "document 0"),
        ([(np.array([6, 1]), 1), (np.array([6.0, 1.0]), 1)], "document 1"),
        ([(np.array([[6, 1]]), 1)], "document 0"),
        ([(np.array([6, 1]), 0)], "0 bytes"),
        ([(np.array([6, 7]), 1)], "token id 7"),
        ([(np.array([6, -1]), 1)], "token id -1"),
    ],
)
@pytest.mark.parametrize("window", [None, 8])
def test_bad_documents_are_named(model, documents, word, window):
    with pytest.raises(ValueError, match=word) as caught:
        score_documents(model, documents, window=window, **CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("window", [None, 8])
def test_a_likelihood_that_is_not_finite_names_the_document(model, window, value):
    model.last[3] = value
    fine, bad = np.array([6, 1, 2, 0]), np.array([6, 1, 3, 0])
    with pytest.raises(ValueError, match="document 1: .* not finite"):
        score_documents(model, [(fine, 3), (bad, 3)], window=window, **CPU)
