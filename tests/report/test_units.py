import math

import pytest

from fusedlm.report import units


@pytest.mark.parametrize(
    "value,text",
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1.00 k"),
        (1234567, "1.23 M"),
        (999_999, "1.00 M"),
        (12_345, "12.3 k"),
        (123_456, "123 k"),
        (2.5e9, "2.50 B"),
        (0.123456, "0.123"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_count(value, text):
    assert units.count(value) == text


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (216, "3 min 36 s"),
        (3599.6, "1 h"),
        (3725, "1 h 2 min"),
        (47 * 3600 + 3590, "2 d"),
        (260_000, "3 d"),
        (math.inf, "–"),
    ],
)
def test_duration(seconds, text):
    assert units.duration(seconds) == text


def test_memory_and_percent():
    assert units.memory(2**30) == "1.00 GiB"
    assert units.memory(300 * 2**20) == "300 MiB"
    assert units.percent(0.4567) == "45.7%"
    assert units.percent(0.00114) == "0.11%"
    assert units.percent(0.0) == "0.0%"
