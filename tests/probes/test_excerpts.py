"""Excerpts are evenly spaced and cut from the beginning of documents."""

import numpy as np
import pytest

from fusedlm.probes.excerpts import EvenSample, excerpts


def numbered(*lengths):
    """Documents of text tokens 1000 d + i."""
    return [(np.array([999_999, *(1000 * d + np.arange(n))]), 0) for d, n in enumerate(lengths)]


@pytest.mark.parametrize("most", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 8, 29, 200])
def test_a_sample_is_evenly_spaced(n, most):
    sample = EvenSample(most)
    for i in range(n):
        if sample.wants_next():
            sample.add(i)
    kept = sample.items()
    assert len(kept) == min(n, most)
    assert kept == sorted(set(kept))
    gaps = np.diff(kept)
    assert len(gaps) == 0 or gaps.max() <= 3 * gaps.min() + 1
    assert n <= most or most == 1 or kept[-1] - kept[0] >= n / 2 - 1


def test_documents_are_cut_from_their_beginning_and_long_enough_ends_are_kept():
    found, longest = excerpts(numbered(25, 9, 40), [(10, 10), (5, 10), (41, 41)], 100)
    assert longest == 40
    assert [s.tokens[0] for s in found[10, 10]] == [0, 10, 2000, 2010, 2020, 2030]
    assert [len(s.tokens) for s in found[5, 10]] == [10, 10, 5, 9, 10, 10, 10, 10]
    assert found[41, 41] == []
    assert all((np.diff(s.tokens) == 1).all() for s in found[10, 10])
    assert [s.before.tolist() for s in found[10, 10]][:3] == [[], [6, 7, 8, 9], []]


def test_there_are_at_most_as_many_as_requested():
    found, _ = excerpts(numbered(*[50] * 30), [(10, 10)], 4)
    starts = [s.tokens[0] for s in found[10, 10]]
    assert len(starts) == 4 and starts[-1] - starts[0] > 15_000
