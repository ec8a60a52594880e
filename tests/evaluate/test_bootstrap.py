"""The interval of a gain."""

import math

import numpy as np
import pytest

from fusedlm.evaluate.adapt.bootstrap import paired_gain


def test_a_constant_gain_has_no_width():
    """Bytes in proportion to tokens: every resample has the same ratio."""
    found = paired_gain(np.full(4000, 3.0), np.full(4000, 2.0), [4000], [8000])
    assert (found.units, found.n_units) == ("blocks", 15)
    assert found.gain == pytest.approx(0.5 / math.log(2))
    assert found.low == pytest.approx(found.gain) and found.high == pytest.approx(found.gain)


def test_documents_are_resampled_if_there_are_enough():
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(20, 60, 40), 0]
    n_bytes = [3 * n for n in lengths]
    means = generator.normal(0.2, 0.1, 41)  # documents differ, tokens of one do not
    adapted = -np.repeat(means, lengths)
    found = paired_gain(np.zeros(sum(lengths)), adapted, lengths, n_bytes)
    assert (found.units, found.n_units) == ("documents", 40)
    assert found.gain == pytest.approx(-adapted.sum() / math.log(2) / sum(n_bytes))
    # Of a ratio estimator: the standard error of sum(saved - gain * bytes) / sum(bytes).
    saved = means[:40] * lengths[:40] / math.log(2)
    error = math.sqrt(((saved - found.gain * np.array(n_bytes[:40])) ** 2).sum()) / sum(n_bytes)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < found.gain < found.high
    assert found == paired_gain(np.zeros(sum(lengths)), adapted, lengths, n_bytes)


def test_few_documents_are_cut_into_blocks():
    found = paired_gain(np.ones(256 * 1000), np.zeros(256 * 1000), [255_000, 1000], [255_000, 9000])
    assert (found.units, found.n_units) == ("blocks", 200)
    assert found.gain == pytest.approx(256_000 / 264_000 / math.log(2))
    assert found.low < found.gain < found.high  # the bytes per token differ


def test_a_short_text_has_no_interval():
    found = paired_gain(np.ones(511), np.zeros(511), [511], [511])
    assert (found.low, found.high, found.n_units) == (None, None, 1)
