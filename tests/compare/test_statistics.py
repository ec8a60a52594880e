"""Intervals and verdicts against tables and values computed by hand."""

import pytest

from fusedlm.compare.statistics import judge, summarise, t_cdf, t_quantile

# df, two-sided 90%, 95% and 99%: any printed table of Student's t.
TABLE = [
    (1, 6.314, 12.706, 63.657),
    (2, 2.920, 4.303, 9.925),
    (3, 2.353, 3.182, 5.841),
    (4, 2.132, 2.776, 4.604),
    (5, 2.015, 2.571, 4.032),
    (9, 1.833, 2.262, 3.250),
    (10, 1.812, 2.228, 3.169),
    (30, 1.697, 2.042, 2.750),
    (120, 1.658, 1.980, 2.617),
]


@pytest.mark.parametrize(("df", "p95", "p975", "p995"), TABLE)
def test_quantiles_are_those_of_the_table(df, p95, p975, p995):
    for p, expected in ((0.95, p95), (0.975, p975), (0.995, p995)):
        assert t_quantile(p, df) == pytest.approx(expected, abs=6e-4)
        assert t_quantile(1 - p, df) == pytest.approx(-expected, abs=6e-4)
        assert t_cdf(t_quantile(p, df), df) == pytest.approx(p, abs=1e-12)


def test_the_distribution_is_symmetric_and_exact_where_it_has_a_closed_form():
    assert t_cdf(0, 7) == 0.5
    assert t_cdf(1, 1) == pytest.approx(0.75)  # Cauchy
    assert t_cdf(2**0.5, 2) == pytest.approx(0.5 + 0.5 * 0.5**0.5)  # 1/2 + t / (2 sqrt(2 + t²))
    assert t_cdf(-1.3, 6) == pytest.approx(1 - t_cdf(1.3, 6))


@pytest.mark.parametrize(("p", "df"), [(0, 3), (1, 3), (0.9, 0)])
def test_quantiles_out_of_range_are_refused(p, df):
    with pytest.raises(ValueError, match="t_quantile"):
        t_quantile(p, df)


def test_a_summary_by_hand():
    # Mean 2, squares 1 + 0 + 1 over 2, so std 1; half-width 4.302653 / sqrt(3).
    found = summarise([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.std) == (3, 2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert summarise([]).mean is None
    one = summarise([1.5])
    assert (one.mean, one.std, one.low, one.high) == (1.5, None, None, None)


def _judge(own, other):
    return judge("new", "old", dict(enumerate(own)), dict(enumerate(other)), "validation loss", "nats per token")


def test_intervals_without_zero_are_lower_or_higher():
    # Differences -0.2, -0.15, -0.25: mean -0.2, std 0.05, half-width 4.302653 * 0.05 / sqrt(3) = 0.124207.
    lower = _judge([1.0, 1.1, 1.05], [1.2, 1.25, 1.3])
    assert lower.outcome == "lower"
    assert lower.sentence == (
        "new against old: validation loss lower by 0.2000 nats per token "
        "(95% interval 0.0758 to 0.3242, 3 paired seeds)"
    )
    higher = _judge([1.2, 1.25, 1.3], [1.0, 1.1, 1.05])
    assert higher.outcome == "higher" and "higher by 0.2000" in higher.sentence
    assert "0.0758 to 0.3242" in higher.sentence


def test_an_interval_with_zero_shows_nothing():
    verdict = _judge([1.0, 1.3], [1.2, 1.2])
    assert verdict.outcome == "no difference shown"
    assert verdict.sentence.endswith(
        "no difference shown in validation loss "
        "(-0.0500 nats per token, 95% interval -1.9559 to +1.8559, 2 paired seeds)"
    )
    assert _judge([1.0, 2.0], [1.0, 2.0]).outcome == "no difference shown"


def test_steady_paired_differences_are_shown_though_seeds_vary_more():
    verdict = _judge([1.0, 2.0, 3.0], [1.1, 2.1, 3.11])
    assert verdict.outcome == "lower"


def test_one_seed_gives_no_verdict():
    verdict = _judge([1.0], [1.2])
    assert verdict.outcome == "no verdict" and verdict.sentence.endswith("one seed: no verdict")
    assert "lower by 0.2000" in verdict.sentence


def test_only_seeds_that_both_have_are_paired():
    verdict = judge("new", "old", {0: 1.0, 1: 1.1, 7: 9.0}, {0: 1.2, 1: 1.3, 2: 0.0}, "loss", "nats")
    assert verdict.difference.n == 2 and verdict.difference.mean == pytest.approx(-0.2)
    assert judge("new", "old", {0: 1.0}, {1: 1.0}, "loss", "nats").sentence.endswith(
        "no seed is finished in both: no verdict"
    )
