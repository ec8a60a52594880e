"""Statistics of few seeds: means, intervals of Student's t, paired differences and verdicts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Summary:
    """Of one value over seeds. All is None without seeds, all but the mean with one seed."""

    n: int
    mean: float | None
    std: float | None  # of the sample, with n - 1
    low: float | None  # confidence interval of the mean
    high: float | None


@dataclass(frozen=True)
class Verdict:
    """On the differences variant - baseline over the seeds that both have finished."""

    difference: Summary
    outcome: str  # "lower", "higher", "no difference shown" or "no verdict"
    sentence: str


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation and the 95% interval of the mean, mean ± t(n - 1) std / sqrt(n)."""
    n = len(values)
    if n == 0:
        return Summary(0, None, None, None, None)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None, None, None)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile((1 + LEVEL) / 2, n - 1) * std / math.sqrt(n)
    return Summary(n, mean, std, mean - half, mean + half)


def judge(
    variant: str,
    baseline: str,
    own: dict[int, float],
    other: dict[int, float],
    what: str,
    unit: str,
    lost: str = "",
) -> Verdict:
    """Compare two variants seed by seed.

    Args:
        own, other: seed -> value of the variant and of the baseline, for finished runs.
        what, unit: of the value, for the sentence: "validation loss", "nats per token".
        lost: which runs ended without a value, and how; the sentence says it before any difference of the others.
    """
    seeds = sorted(own.keys() & other.keys())
    difference = summarise([own[seed] - other[seed] for seed in seeds])
    pair = f"{variant} against {baseline}:"
    if not seeds:
        return Verdict(difference, "no verdict", f"{pair} {lost or 'no seed is finished in both'}: no verdict")
    if lost:
        both = f"the {len(seeds)} seeds" if len(seeds) > 1 else "the one seed"
        pair += f" {lost}; on {both} that both finished:"
    mean = difference.mean
    if len(seeds) == 1:
        side = "the same" if mean == 0 else f"{'lower' if mean < 0 else 'higher'} by {abs(mean):.4f} {unit}"
        return Verdict(difference, "no verdict", f"{pair} {what} {side} on seed {seeds[0]}; one seed: no verdict")
    low, high = difference.low, difference.high
    paired = f"{len(seeds)} paired seeds"
    if low <= 0 <= high:
        interval = f"{mean:+.4f} {unit}, 95% interval {low:+.4f} to {high:+.4f}, {paired}"
        return Verdict(difference, "no difference shown", f"{pair} no difference shown in {what} ({interval})")
    outcome = "lower" if mean < 0 else "higher"
    near, far = sorted((abs(low), abs(high)))
    interval = f"95% interval {near:.4f} to {far:.4f}, {paired}"
    return Verdict(difference, outcome, f"{pair} {what} {outcome} by {abs(mean):.4f} {unit} ({interval})")


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with df degrees of freedom, by the finite series for whole df (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4)."""
    angle = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    # Terms cos^k with products of (k - 1) / k as factors, k in steps of two up to df - 2.
    odd = df % 2
    term = cosine if odd else 1.0
    total, k = 0.0, 1 if odd else 0
    while k <= df - 2:
        total += term
        k += 2
        term *= cosine * cosine * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + math.copysign(inside / 2, t)


def t_quantile(p: float, df: int) -> float:
    """The t with t_cdf(t, df) = p, by bisection.

    Raises:
        ValueError: p is not between 0 and 1, or df is below 1.
    """
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"t_quantile of p={p}, df={df}: p must be between 0 and 1, df at least 1")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        if t_cdf(middle, df) < p:
            low = middle
        else:
            high = middle
