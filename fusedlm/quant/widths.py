"""Which of several widths each matrix gets, so that all fit a number of bytes and the error is least."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way to store a matrix.

    key: what it is, for the caller. n_bytes: what it takes. error: what it costs, in any unit that adds up.
    """

    key: object
    n_bytes: int
    error: float


def choose_options(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option per matrix, whose bytes are at most a budget.

    Options on the lower convex hull of (bytes, error) are taken in the order of error saved per byte, which is the
    optimum of the Lagrangian at the budget where the next step stops to fit; then whatever still fits is taken, the
    largest saving first. Nothing that still fits would lower the error any more.

    Raises:
        ValueError: the smallest options do not fit.
    """
    chosen = {name: min(own, key=lambda o: (o.n_bytes, o.error)) for name, own in options.items()}
    total = sum(option.n_bytes for option in chosen.values())
    if total > budget:
        raise ValueError(f"the smallest widths take {total:,} bytes, {total - budget:,} more than {budget:,}")
    steps = []
    for name, own in options.items():
        hull = _hull(own)
        for number, (before, after) in enumerate(zip(hull, hull[1:], strict=False)):
            saved = (before.error - after.error) / (after.n_bytes - before.n_bytes)
            steps.append((-saved, name, number, after))
    # Savings per byte decrease along a hull: sorted, the steps of a matrix stay in order.
    for _, name, _, after in sorted(steps, key=lambda step: step[:3]):
        extra = after.n_bytes - chosen[name].n_bytes
        if extra > 0 and total + extra <= budget:
            chosen[name], total = after, total + extra
    while True:
        fitting = [
            (chosen[name].error - option.error, name, option)
            for name, own in options.items()
            for option in own
            if option.error < chosen[name].error and total - chosen[name].n_bytes + option.n_bytes <= budget
        ]
        if not fitting:
            return chosen
        _, name, option = max(fitting, key=lambda found: found[0])
        chosen[name], total = option, total - chosen[name].n_bytes + option.n_bytes


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options of the lower convex hull of (bytes, error) from the smallest to the one with the least error."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.error - a.error) / (b.n_bytes - a.n_bytes)
