"""Sliding windows and their batches."""

import numpy as np
import pytest

from fusedlm.evaluate.windows import batches, document_windows, window_spans


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 31])
def test_every_token_is_scored_exactly_once(n):
    for window in range(1, n + 3):
        for stride in range(1, window + 1):
            spans = list(window_spans(n, window, stride))
            scored = [i for _, stop, first in spans for i in range(first, stop)]
            assert scored == list(range(n))
            for i, (start, stop, first) in enumerate(spans):
                assert start == i * stride and stop == min(start + window, n) and start <= first < stop


def test_context_before_a_scored_token_is_at_least_the_overlap():
    for start, _, first in list(window_spans(1000, 64, 16))[1:]:
        assert first - start == 48


def test_targets_follow_their_inputs():
    tokens = np.arange(50)
    for window in document_windows(3, tokens, 16, 5):
        assert window.document == 3
        assert (window.targets == window.inputs + 1).all()
        assert len(window.inputs) == len(window.targets) >= window.n_scored


def test_batches_hold_every_window_once_and_pad_little():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 400, 500)
    windows = [w for i, n in enumerate(lengths) for w in document_windows(i, np.zeros(n + 1, dtype=int), 256, 128)]
    grouped = list(batches(windows, 256, 2048))
    seen = [id(row) for rows, _ in grouped for row in rows]
    assert sorted(seen) == sorted(id(w) for w in windows)
    assert all(len(rows) * width <= 2048 for rows, width in grouped)
    assert len({width for _, width in grouped}) <= 16
    padded = sum(len(rows) * width for rows, width in grouped)
    assert padded < 1.06 * sum(len(w.inputs) for w in windows)


def test_a_window_longer_than_the_batch_is_a_batch():
    windows = list(document_windows(0, np.zeros(301, dtype=int), 100, 100))
    assert [(len(rows), width) for rows, width in batches(windows, 100, 10)] == [(1, 100)] * 3
