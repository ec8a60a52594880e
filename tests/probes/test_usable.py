"""The first line of the probe of context extension, against results made by hand."""

import json
from pathlib import Path

import pytest

from fusedlm.probes.usable import describe_usable, usable_context

RECORD = Path(__file__).parents[2] / "benchmarks/results/probes/extend.json"


def result(curves: dict, rope: bool = True) -> dict:
    """Of training length 8 with two buckets; the second bucket of each length has twice the bytes of the first.

    Args:
        curves: factor or None -> bits per byte over each training length.
    """
    n = len(curves[None])
    rows = [
        {"yarn": factor, "bpb": [v for value in values for v in (value + 0.2, value - 0.1)]}
        for factor, values in curves.items()
    ]
    return {
        "trained_length": 8,
        "rope": rope,
        "ends": [4 * (i + 1) for i in range(2 * n)],
        "bytes": [10, 20] * n,
        "curves": rows,
    }


def test_a_context_that_can_be_used_as_it_is():
    found = result({None: [2.0, 1.9, 1.95, 2.01], 2.0: [2.1, 2.0, 2.0, 2.0]})
    assert usable_context(found) == {
        "as_it_is": 32,
        "yarn": None,
        "with_yarn": None,
        "cost": None,
        "relative_cost": None,
        "scored": 32,
    }
    assert describe_usable(found) == (
        "The context can be used as it is up to 32 tokens (4× the training length), the longest scored: bits per byte "
        "stay within 1% of the 2.0000 up to the training length."
    )


def test_the_factor_that_reaches_furthest_at_the_least_cost():
    curves = {
        None: [2.0, 2.0, 2.5, 2.0],  # a later length that fits again is beyond one that does not
        2.0: [2.01, 2.0, 2.0, 2.1],
        4.0: [2.04, 2.04, 2.04, 2.04],
        8.0: [2.02, 2.03, 2.03, 2.03],
    }
    found = usable_context(result(curves))
    assert (found["as_it_is"], found["yarn"], found["with_yarn"], found["scored"]) == (16, 8.0, 32, 32)
    assert found["cost"] == pytest.approx(0.02) and found["relative_cost"] == pytest.approx(0.01)
    assert describe_usable(result(curves)).endswith(
        "up to 16 tokens (2× the training length): bits per byte stay within 1% of the 2.0000 up to the training "
        "length, and not beyond. With YaRN factor 8 (--yarn 8) up to 32 tokens (4× the training length), the longest "
        "scored, at a cost of +0.0200 bits per byte (+1.0%) within the training length."
    )


def test_no_factor_helps():
    curves = {None: [2.0, 2.5], 2.0: [2.2, 2.5], 4.0: [2.2, 2.6]}
    assert describe_usable(result(curves)).endswith(
        "up to 8 tokens (1× the training length): bits per byte stay within 1% of the 2.0000 up to the training "
        "length, and not beyond. No YaRN factor extends it (tried: 2, 4)."
    )
    assert "YaRN does not apply" in describe_usable(result({None: [2.0, 2.5]}, rope=False))


def test_text_too_short_to_tell():
    text = describe_usable(result({None: [2.0], 2.0: [2.1]}))
    assert text.startswith("No document is longer than 1× the training length of 8 tokens") and "--text" in text


def test_the_published_record():
    found = usable_context(json.loads(RECORD.read_text()))
    assert (found["as_it_is"], found["yarn"], found["with_yarn"]) == (256, 8.0, 2048)
    assert found["cost"] == pytest.approx(0.0315, abs=1e-4)
