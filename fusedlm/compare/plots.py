"""The plots of an experiment."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fusedlm.compare.results import Results
from fusedlm.compare.time_to_loss import seconds_of_validations
from fusedlm.report.history import History, half_life, smooth, thin
from fusedlm.report.style import (
    FULL,
    HALF,
    INK,
    MUTED,
    PALETTE,
    Drawing,
    Plot,
    canvas,
    padded,
    plain_axes,
    plot,
    wide_size,
)
from fusedlm.report.svg import hover
from fusedlm.report.text import shortened
from fusedlm.report.units import count, memory, memory_unit, power_of, size

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_SHOWN = 1200  # points of a curve
_EARLY = 0.2  # fraction of training whose losses can be above the plot

Curve = Callable[[History, int], tuple[np.ndarray, np.ndarray]]  # of a run and its seed


def draw_plots(results: Results) -> list[Plot]:
    """Every plot for which there are measurements."""
    draw = (_final, _tuning, _validation, _seconds, _difference, _training, _flops, _cost, _state, _decoding)
    plots = [plot(partial(one, results)) for one in draw]
    return [one for one in plots if one is not None]


def _look(results: Results, name: str) -> dict:
    index = list(results.variants).index(name)
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": _DASHES[index // len(PALETTE) % len(_DASHES)]}


def _final(results: Results, narrow: bool) -> Drawing | None:
    """Every seed, the mean and its interval, one row per variant."""
    column, what, unit = results.metric
    names = [name for name in results.variants if results.values(name, column)]
    if not names:
        return None
    figure = canvas((wide_size(narrow)[0], 1.0 + 0.34 * len(names)))
    axes = figure.subplots()
    plain_axes(axes)
    axes.grid(visible=False)
    intervals = False
    dots = [value for name in names for value in results.values(name, column).values()]
    for row, name in enumerate(names):
        colour = _look(results, name)["color"]
        values, summary = list(results.values(name, column).values()), results.summary(name, column)
        if summary.low is not None:
            axes.plot(
                [summary.low, summary.high], [row, row], color=colour, linewidth=5, alpha=0.25, solid_capstyle="butt"
            )
            intervals = True
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=4.5, alpha=0.8, markeredgewidth=0)
        axes.plot([summary.mean] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
        written = f" {summary.mean:.4f}"
        axes.annotate(written, (1, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=INK)
    if names[0] == results.baseline:
        axes.axvline(
            results.summary(names[0], column).mean, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0
        )
    axes.yaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.set_yticklabels([_fit(results.label(name), narrow) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    span = max(dots) - min(dots) or 0.02 * abs(dots[0]) or 1.0
    axes.set_xlim(min(dots) - 0.6 * span, max(dots) + 0.6 * span)
    axes.set_xlabel(f"{_capital(what)} ({unit})")
    caption = "All validation text at the end of training: seeds (dots) and mean (bar); dashed: mean of the baseline."
    if intervals:
        caption += " The band is the 95% interval of the mean; it can extend beyond the edge."
    return Drawing("final", f"Final {what}", _complete(results, caption), figure, wide=True)


def _tuning(results: Results, narrow: bool) -> Drawing | None:
    """Final loss of the trials against the factor of the learning rates."""
    column, what, unit = results.metric
    found = {
        name: [(trial.factor, loss) for trial in tuning.trials if (loss := getattr(trial, column)) is not None]
        for name, tuning in results.tunings.items()
    }
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None
    figure, axes = _with_legend(results, found, narrow)
    for name, points in found.items():
        look = _look(results, name)
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=1.5, marker="o", markersize=3.5, **look)
        hover(line, name)
        if (best := results.tunings[name].best) is not None:
            axes.plot(best.factor, getattr(best, column), "o", color=look["color"], markersize=7)
    factors = sorted(results.experiment.tune.lr_factors)
    axes.set_xscale("log")
    axes.set_xlim(factors[0] / 1.1, factors[-1] * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(factors))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("Factor of the learning rates")
    axes.set_ylabel(f"{_capital(what)} ({unit})")
    caption = "All validation text at the end of each trial; large: the best of a variant, which its runs use."
    n_lost = sum(trial.outcome in ("diverged", "failed") for one in results.tunings.values() for trial in one.trials)
    if n_lost:
        caption += f" {_count(n_lost, 'trial')} without a loss, diverged or failed."
    return Drawing("tuning", "Tuning of the learning rates", caption, figure, wide=True)


def _validation(results: Results, narrow: bool) -> Drawing | None:
    curves, label, target = _validations(results, "tokens")
    return _lines(results, narrow, curves, "validation", "Validation loss", label, dots=True, target=target)


def _seconds(results: Results, narrow: bool) -> Drawing | None:
    """The same against seconds of training, the mean over seeds."""
    if results.shared:
        return None
    curves, label, target = _validations(results, "step")
    for name, (steps, *rest) in list(curves.items()):
        elapsed = []
        for row in results.of(name):
            history = results.histories[name, row["seed"]]
            elapsed.append(np.interp(steps, history.validation["step"], seconds_of_validations(history)))
        curves[name] = (np.mean(elapsed, axis=0), *rest)
    title = "Validation loss against training time"
    axis = "Seconds of training"
    return _lines(results, narrow, curves, "seconds", title, label, dots=True, target=target, axis=axis)


def _validations(results: Results, x: str) -> tuple[dict, str, float | None]:
    """Curves of validations against a column, the label of their axis, and the baseline's mean at its end."""
    column, what, unit = results.metric
    key = "val_nll_per_token" if column == "val_loss" else "val_bpb"
    curves = _curves(results, lambda history, _: (history.validation[x], history.validation[key]))
    target = None
    if results.experiment.weights == "raw" and results.time_to_loss(results.baseline) is not None:
        lasts = [results.histories[results.baseline, row["seed"]] for row in results.of(results.baseline)]
        target = float(np.mean([history.validation[key][-1] for history in lasts]))
    return curves, f"{_capital(what)} ({unit})", target


def _difference(results: Results, narrow: bool) -> Drawing | None:
    """Differences from the baseline, for which curves of losses are too close together."""
    column, what, unit = results.metric
    key = "val_nll_per_token" if column == "val_loss" else "val_bpb"
    base = {row["seed"]: results.histories[results.baseline, row["seed"]] for row in results.of(results.baseline)}
    at_base = {
        seed: dict(zip(history.validation["tokens"].tolist(), history.validation[key].tolist(), strict=True))
        for seed, history in base.items()
    }

    def difference(history: History, seed: int):
        tokens = history.validation["tokens"]
        own = history.validation[key]
        return tokens, own - np.array([at_base.get(seed, {}).get(x, np.nan) for x in tokens.tolist()])

    others = [name for name in results.variants if name != results.baseline]
    curves = _curves(results, difference, others, [seed for seed in results.experiment.seeds if seed in at_base])
    if not _are_lines(curves):
        return None
    figure, axes = _with_legend(results, curves, narrow)
    power, word = power_of(max(x[-1] for x, *_ in curves.values()))
    for name, (x, mean, low, high) in curves.items():
        _band(axes, results, name, x / power, mean, low, high, dots=len(x) <= 40)
    axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.01 * max(x[-1] for x, *_ in curves.values()) / power)
    late = [bound[x >= _EARLY * x[-1]] for x, _, *bounds in curves.values() for bound in bounds]
    axes.set_ylim(padded(min(0, *(bound.min() for bound in late)), max(0, *(bound.max() for bound in late))))
    axes.set_xlabel(f"Tokens ({word})" if word else "Tokens")
    axes.set_ylabel(f"Difference ({unit})")
    title = f"{_capital(what)} relative to {results.baseline}"
    caption = "Difference at the same seed and number of tokens; below zero is better than the baseline."
    if len(at_base) > 1:
        caption += " Line: mean over seeds; band: lowest to highest."
    return Drawing("difference", title, _complete(results, caption), figure, wide=True)


def _training(results: Results, narrow: bool) -> Drawing | None:
    def smoothed(history: History, _):
        loss = history.steps["loss"]
        return history.steps["tokens"], smooth(loss, half_life(len(loss)))

    curves = _curves(results, smoothed)
    label = "Training loss (nats per token)"
    return _lines(results, narrow, curves, "training", "Training loss", label, dots=False)


def _flops(results: Results, narrow: bool) -> Drawing | None:
    column, what, unit = results.metric
    key = "val_nll_per_token" if column == "val_loss" else "val_bpb"
    curves = _curves(results, lambda history, _: (history.validation["tokens"], history.validation[key]))
    curves = {name: (x * results.variants[name].account.flops_per_token, *rest) for name, (x, *rest) in curves.items()}
    if not curves:
        return None
    figure, axes = _with_legend(results, curves, narrow)
    for name, (x, mean, low, high) in curves.items():
        _band(axes, results, name, x, mean, low, high, dots=len(x) <= 40)
    low, high = min(x[0] for x, *_ in curves.values()) / 1.1, max(x[-1] for x, *_ in curves.values()) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    _limit(axes, curves)
    axes.set_xlabel("Training FLOPs (of matrix products)")
    axes.set_ylabel(f"{_capital(what)} ({unit})")
    caption = "The same validations against training FLOPs, computed from the shapes of the recipe." + _overflow(curves)
    return Drawing("flops", "Loss against training FLOPs", _complete(results, caption), figure, wide=True)


def _cost(results: Results, narrow: bool) -> Drawing | None:
    names = [name for name in results.variants if results.values(name, "tokens_per_second")]
    if not names:
        return None
    height = 1.1 + 0.3 * len(names)
    figure = canvas((wide_size(narrow)[0], 2 * height if narrow else height))
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2, sharey=True)
    rates = {name: results.summary(name, "tokens_per_second").mean for name in names}
    peaks = {name: max(results.values(name, "peak_memory_bytes").values(), default=0) for name in names}
    power, word = power_of(max(rates.values()))
    unit, memory_name = memory_unit(max(peaks.values()))
    for axes, values, scale, label, written in (
        (left, rates, power, f"Training tokens per second ({word})" if word else "Training tokens per second", count),
        (right, peaks, unit, f"Peak memory ({memory_name})", memory),
    ):
        plain_axes(axes)
        axes.grid(visible=False)
        for row, name in enumerate(names):
            axes.barh(row, values[name] / scale, height=0.62, color=_look(results, name)["color"])
            axes.text(values[name] / scale, row, f" {written(values[name])}", va="center", fontsize=8, color=INK)
        axes.set_xlim(0, 1.22 * (max(values.values()) / scale or 1))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.yaxis.set_major_locator(FixedLocator(range(len(names))))
        axes.set_xlabel(label)
    left.set_yticklabels([_fit(results.label(name), narrow) for name in names])
    if narrow:
        right.set_yticklabels([_fit(results.label(name), narrow) for name in names])
    else:
        right.tick_params(labelleft=False)
    first, second = ("Above", "Below") if narrow else ("Left", "Right")
    caption = (
        f"{first}: median over steps without warm-up, mean over seeds. {second}: highest of any seed; that of tensors "
        "on the GPU, of the full process on the CPU."
    )
    caption = _complete(results, caption)
    return Drawing("cost", "Training throughput and memory", caption, figure, wide=True)


def _state(results: Results, narrow: bool) -> Drawing | None:
    found = _by_length(results, 0)
    if not found:
        return None
    figure, axes = _length_axes(results, found, size)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.set_ylabel("State of one sequence")
    caption = "Bytes of the live tensors of the decoding state of one sequence."
    return Drawing("state", "Decoding state against length", caption, figure)


def _decoding(results: Results, narrow: bool) -> Drawing | None:
    found = _by_length(results, 1)
    if not found:
        return None
    figure, axes = _length_axes(results, found, count)
    rates = [rate for _, values in found.values() for rate in values]
    if max(rates) > 8 * min(rates):
        axes.set_yscale("log")
        axes.set_ylim(min(rates) / 1.3, max(rates) * 1.3)
        axes.yaxis.set_major_locator(FixedLocator(_ticks(min(rates) / 1.3, max(rates) * 1.3)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(0, 1.08 * max(rates))
    axes.set_ylabel("Tokens per second")
    caption = "One sequence, one token per step: median step after each number of tokens."
    return Drawing("decoding", "Decoding throughput against length", caption, figure)


def _curves(
    results: Results, curve: Curve, names: list[str] | None = None, seeds: list[int] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """variant -> (x, mean, lowest, highest) over its seeds, at the x that all seeds have."""
    curves = {}
    for name in results.variants if names is None else names:
        tables = []
        for row in results.of(name):
            if seeds is None or row["seed"] in seeds:
                x, y = curve(results.histories[name, row["seed"]], row["seed"])
                tables.append({a: b for a, b in zip(x.tolist(), y.tolist(), strict=True) if np.isfinite(b)})
        shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        if shared:
            values = np.array([[table[x] for x in shared] for table in tables])
            curves[name] = (np.array(shared), values.mean(0), values.min(0), values.max(0))
    return curves


def _lines(
    results: Results,
    narrow: bool,
    curves: dict,
    name: str,
    title: str,
    label: str,
    dots: bool,
    target: float | None = None,
    axis: str = "Tokens",
) -> Drawing | None:
    """Args: target: of the dashed line, the baseline's final loss."""
    if not _are_lines(curves):
        return None
    figure, axes = _with_legend(results, curves, narrow)
    power, word = power_of(max(x[-1] for x, *_ in curves.values()))
    for variant, (x, mean, low, high) in curves.items():
        _band(axes, results, variant, x / power, mean, low, high, dots=dots and len(x) <= 40)
    if target is not None:
        axes.axhline(target, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlim(0, 1.01 * max(x[-1] for x, *_ in curves.values()) / power)
    _limit(axes, curves)
    axes.set_xlabel(f"{axis} ({word})" if word else axis)
    axes.set_ylabel(label)
    n_seeds = max(len(results.of(variant)) for variant in curves)
    caption = "Line: mean over seeds; band: lowest to highest." if n_seeds > 1 else "One seed."
    if target is not None:
        caption += f" Dashed: final loss of {results.baseline}."
    if name == "seconds":
        caption += " Without validations and compilation; mean over seeds."
    if name == "training" and (most := max(len(x) for x, *_ in curves.values())) >= 20:
        caption += f" Smoothed on both sides with a half-life of {_count(half_life(most), 'step')}."
    return Drawing(name, title, _complete(results, caption + _overflow(curves)), figure, wide=True)


def _are_lines(curves: dict) -> bool:
    """Whether a curve has two points: one alone is the final loss, which has a plot of its own."""
    return any(len(x) > 1 for x, *_ in curves.values())


def _with_legend(results: Results, names, narrow: bool) -> tuple[Figure, Axes]:
    """Wide axes with a legend to the right, or on a narrow page below."""
    height = 3.0 + 0.2 * len(names) if narrow else max(FULL[1], 0.9 + 0.2 * len(names))
    figure = canvas(wide_size(narrow, height))
    axes = figure.subplots()
    plain_axes(axes)
    for name in names:
        axes.plot([], [], label=_fit(results.label(name), narrow), linewidth=1.8, **_look(results, name))
    look = {"frameon": False, "fontsize": 8, "labelcolor": INK, "handlelength": 2.2}
    if narrow:
        figure.legend(loc="outside lower left", **look)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0, **look)
    return figure, axes


def _band(axes: Axes, results: Results, name: str, x, mean, low, high, dots: bool) -> None:
    look = _look(results, name)
    if (high > low).any():
        axes.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
    marker = {"marker": "o", "markersize": 3.5} if dots else {}
    (line,) = axes.plot(*thin(x, mean, _SHOWN), linewidth=1.5, **look, **marker)
    hover(line, results.label(name))


def _complete(results: Results, caption: str) -> str:
    """A caption that says which runs the curves and means are without."""
    return " ".join(filter(None, (caption, results.left_out())))


def _limit(axes: Axes, curves: dict) -> None:
    top, lowest = _top(curves), min(low.min() for _, _, low, _ in curves.values())
    axes.set_ylim(padded(lowest, top))


def _top(curves: dict) -> float:
    """The highest loss after the first fifth of training."""
    kept = [high[x >= _EARLY * x[-1]] for x, _, _, high in curves.values()]
    return max(high.max() for high in kept)


def _overflow(curves: dict) -> str:
    top = _top(curves)
    return (
        " Higher losses in the first fifth of training are cut off."
        if any(high.max() > top for *_, high in curves.values())
        else ""
    )


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade between two positive numbers, or the two numbers; for logarithmic axes."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high] or [low, high]


def _power(value: float) -> str:
    """2e+09 as 2e9."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _by_length(results: Results, which: int) -> dict[str, tuple[list[int], list[float]]]:
    """variant -> (lengths, values) of what was measured; which: 0 is bytes, 1 is tokens per second."""
    found = {}
    for name in results.variants:
        measured = {int(n): value for n, value in (results.decoding[name] or {}).items() if value is not None}
        lengths = sorted(n for n in measured if n in results.experiment.decode_lengths)
        if lengths:
            found[name] = (lengths, [measured[n][which] for n in lengths])
    return found


def _length_axes(results: Results, found: dict, written: Callable[[float], str]) -> tuple[Figure, Axes]:
    """Curves against length, with a legend below."""
    columns = 3 if max(map(len, found)) <= 14 else 1
    rows = -(-len(found) // columns)
    figure = canvas((HALF[0], HALF[1] + 0.17 * rows))
    axes = figure.subplots()
    plain_axes(axes)
    for index, (name, (lengths, values)) in enumerate(found.items()):
        markersize = 3.5 + 4 * (1 - index / len(found))  # markers at the same point stay visible
        look = {"marker": "o", "markersize": markersize, "linewidth": 1.6}
        (line,) = axes.plot(lengths, values, label=_fit(name, False), **look, **_look(results, name))
        hover(line, name, [written(value) for value in values])
    ticks = sorted({length for lengths, _ in found.values() for length in lengths})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_name(int(value))))
    axes.set_xlabel("Tokens seen")
    look = {"frameon": False, "fontsize": 7.5, "labelcolor": INK, "handlelength": 1.8}
    figure.legend(loc="outside lower center", ncols=columns, **look)
    return figure, axes


def length_name(length: int) -> str:
    """1024 as 1k."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _bytes(value: float) -> str:
    for power, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= power:
            return f"{value / power:g} {unit}"
    return f"{value:g} B"


def _fit(label: str, narrow: bool) -> str:
    """A label that leaves the axes enough space."""
    return shortened(label, 22 if narrow else 44)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
