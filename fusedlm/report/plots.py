"""The plots of a run."""

import itertools
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fusedlm.report.history import History, half_life, median, smooth, thin
from fusedlm.report.style import (
    HALF,
    INK,
    MUTED,
    PALETTE,
    RAW,
    Drawing,
    Plot,
    canvas,
    padded,
    plain_axes,
    plot,
    wide_size,
)
from fusedlm.report.svg import hover
from fusedlm.report.text import clean, shortened
from fusedlm.report.units import count, memory, memory_unit, percent, power_of

_LINE, _SECOND = PALETTE[:2]
_SHOWN = 1200  # points of a curve
# Of the map of expert loads: the highest over the mean load up to which a shade holds, and its opacity.
_SHADES = ((1.1, 0.07), (1.25, 0.16), (1.5, 0.28), (2.0, 0.42), (3.0, 0.58), (5.0, 0.78), (np.inf, 1.0))
_INTERVALS = 60  # of the steps in the map


def draw_plots(history: History) -> list[Plot]:
    """The plots for which the run has values."""
    draw = (_loss, _validation, _optimization, _throughput, _memory, _layer_losses, _routing, _loads)
    plots = [plot(partial(one, history)) for one in draw]
    return [one for one in plots if one is not None]


def _loss(history: History, narrow: bool) -> Drawing | None:
    """Training and validation loss, in the same unit."""
    loss, held_out = history.steps["loss"], history.validation["val_nll_per_token"]
    values, validated = loss[np.isfinite(loss)], held_out[np.isfinite(held_out)]
    if not len(values) and not len(validated):
        return None
    figure, axes, x = _figure(history, wide_size(narrow))
    caption = []
    if len(values):
        _curve(axes, x, loss, "training")
        caption.append(_describe_loss(loss))
    both = validated
    if len(values):
        top = _robust_top(values)
        above = int((values > top).sum())
        both = np.concatenate([np.minimum(values, top), validated])
        if above:
            lie = "value lies" if above == 1 else "values lie"
            caption.append(f"{above} {lie} above the plot, up to {values.max():.3g}.")
    if len(validated):
        at = _style(axes, history, history.validation["tokens"])
        _line(axes, at, held_out, "validation", color=_SECOND, dots=True)
        caption.append(f"Validation: held-out text{_windows(history)}.")
    if len(values) and len(validated):
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    axes.set_ylim(*padded(both.min(), both.max()))
    axes.set_ylabel("Loss (nats per token)")
    title = "Training and validation loss" if len(validated) else "Training loss"
    return Drawing("loss", title, " ".join(caption), figure, wide=True)


def _describe_loss(loss: np.ndarray) -> str:
    if len(loss) < 20:
        return "The loss of each step."
    smoothed = smooth(loss, half_life(len(loss)))
    last = smoothed[np.isfinite(smoothed)][-1]
    return (
        f"Training: each step (thin) and a two-sided exponential average with a half-life of {half_life(len(loss))} "
        f"steps (bold), which ends at {last:.3f}."
    )


def _validation(history: History, narrow: bool) -> Drawing | None:
    bpb = history.validation["val_bpb"]
    if not np.isfinite(bpb).any():
        return None
    figure, axes, x = _figure(history, HALF, history.validation["tokens"])
    averages = {"moving average (ema)": (_SECOND, "ema"), "mean near the end (swa)": (PALETTE[2], "swa")}
    averaged = {name: (color, history.validation[f"val_bpb_{key}"]) for name, (color, key) in averages.items()}
    averaged = {name: (color, values) for name, (color, values) in averaged.items() if np.isfinite(values).any()}
    for name, (color, values) in averaged.items():
        _line(axes, x, values, name, color=color, dots=True)
    _line(axes, x, bpb, "weights as trained", dots=True)
    if averaged:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    best = int(np.nanargmin(bpb))
    axes.plot(x[best : best + 1], bpb[best : best + 1], color=_LINE, marker="o", markersize=7, clip_on=False)
    axes.set_ylabel("Bits per byte")
    both = np.concatenate([bpb, *(values for _, values in averaged.values())])
    axes.set_ylim(*padded(np.nanmin(both), np.nanmax(both)))
    caption = f"Held-out text{_windows(history)}; the best, {bpb[best]:.4f} at step "
    caption += f"{history.validation['step'][best]:.0f}, is marked."
    return Drawing("validation", "Validation bits per byte", caption, figure)


def _windows(history: History) -> str:
    """Window and stride of the validations; empty if they are not recorded or not the same in all."""
    window, stride = (np.unique(history.validation[name]) for name in ("val_window", "val_stride"))
    if len(window) != 1 or len(stride) != 1 or not np.isfinite([window[0], stride[0]]).all():
        return ""
    return f" (window {window[0]:.0f}, stride {stride[0]:.0f})"


def _optimization(history: History, narrow: bool) -> Drawing | None:
    lr, norm = history.steps["lr"], history.steps["grad_norm"]
    shown = [name for name, values in (("lr", lr), ("norm", norm)) if np.isfinite(values).any()]
    if not shown:
        return None
    figure = canvas(HALF)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for name, axes in zip(shown, panels, strict=True):
        x = _style(axes, history)
        if axes is not panels[-1]:
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)
        if name == "lr":
            _line(axes, x, lr, "learning rate")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
            axes.set_ylabel("Learning rate")
        else:
            _curve(axes, x, norm, "gradient norm")
            positive = norm[np.isfinite(norm) & (norm > 0)]
            if len(positive) and positive.max() > 20 * positive.min():
                _log_scale(axes, positive)
            axes.set_ylabel("Gradient norm")
    figure.align_ylabels()
    caption = "The gradient norm is that of all gradients, before clipping."
    if "norm" not in shown:
        caption = "The learning rate of each step."
    return Drawing("optimization", "Learning rate and gradient norm", caption, figure)


def _throughput(history: History, narrow: bool) -> Drawing | None:
    rate, mfu = history.steps["tokens_per_second"], history.steps["mfu"]
    typical = median(rate)
    if typical is None:
        return None
    power, word = power_of(typical)
    figure, axes, x = _figure(history, HALF)
    _line(axes, x, rate / power, f"tokens per second ({word})" if word else "tokens per second", color=RAW, width=1.0)
    axes.axhline(typical / power, color=_LINE, linewidth=1.6)
    axes.set_ylim(0, 1.1 * _robust_top(rate[np.isfinite(rate)]) / power or 1)
    axes.set_ylabel(f"Tokens per second ({word})" if word else "Tokens per second")
    caption = f"Each step, and the median of {count(typical)} tokens per second"
    if (utilisation := median(mfu)) is not None:
        caption += f", which is {percent(utilisation)} of the device's peak FLOP/s"
    return Drawing("throughput", "Throughput", caption + ".", figure)


def _memory(history: History, narrow: bool) -> Drawing | None:
    used = history.steps["peak_memory_bytes"]
    if not np.isfinite(used).any():
        return None
    highest = float(np.nanmax(used))
    size, unit = memory_unit(highest)
    figure, axes, x = _figure(history, HALF)
    _line(axes, x, used / size, f"peak memory ({unit})")
    axes.set_ylim(0, 1.15 * highest / size or 1)
    axes.set_ylabel(f"Peak memory ({unit})")
    return Drawing("memory", "Memory", f"Peak memory up to each step; {memory(highest)} at most.", figure)


def _layer_losses(history: History, narrow: bool) -> Drawing | None:
    losses = {name: loss for name, loss in history.layer_losses.items() if np.isfinite(loss).any()}
    if not losses:
        return None
    figure, axes, x = _figure(history, HALF)
    for (name, loss), color in zip(losses.items(), itertools.cycle(PALETTE)):
        _line(axes, x, _smoothed(loss), shortened(clean(name), 40).lstrip("_"), color=color)
    values = np.concatenate(list(losses.values()))
    axes.set_ylim(*padded(np.nanmin(values), np.nanmax(values)))
    axes.set_ylabel("Weighted loss")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    caption = "Losses of layers with their weights, which the training loss does not include."
    return Drawing("layer_losses", "Losses of layers", caption, figure)


def _routing(history: History, narrow: bool) -> Drawing | None:
    share, budget = history.steps["routed_flops_share"], history.steps["routed_budget"]
    if not np.isfinite(share).any():
        return None
    figure = canvas(wide_size(narrow, 5.6 if narrow else 3.3))
    levels, compute = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    x = _style(levels, history)
    for name, color in (("light", RAW), ("blend", _SECOND), ("full", _LINE)):
        _line(levels, x, _smoothed(history.steps[f"routed_{name}"]), name, color=color)
    levels.set_ylabel("Share of tokens")
    _style(compute, history)
    _curve(compute, x, share, "computed")
    _line(compute, x, budget, "budget", color=MUTED, width=1.0)
    compute.lines[-1].set_linestyle((0, (4, 3)))
    compute.set_ylabel("Share of the full FLOPs")
    for axes, top in ((levels, 1.0), (compute, max(1.0, 1.05 * float(np.nanmax(share))))):
        axes.set_ylim(0, top)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    last = np.flatnonzero(np.isfinite(share))[-1]
    ends = {name: percent(float(history.steps[f"routed_{name}"][last])) for name in ("light", "blend", "full")}
    caption = (
        "Tokens on each level, mean over the routed layers (left), and FLOPs of the routed feed-forwards as a fraction "
        f"of those of full ones (right); at the end {ends['light']} light, {ends['blend']} blended, "
        f"{ends['full']} full, at {percent(float(share[last]))} of the FLOPs."
    )
    return Drawing("routing", "Levels of the routed feed-forward", caption, figure, wide=True)


def _loads(history: History, narrow: bool) -> Drawing | None:
    """How even the loads of experts are: of the worst layer as a curve, of every layer as a map over the steps."""
    worst = history.steps["moe_max_load"]
    if history.max_loads is None or not np.isfinite(worst).any():
        return None
    figure = canvas(wide_size(narrow, 5.6 if narrow else 3.3))
    curve, shades = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    x = _style(curve, history)
    _curve(curve, x, worst, "worst layer")
    curve.set_ylim(1, max(1.5, 1.05 * _robust_top(worst[np.isfinite(worst)])))
    curve.set_ylabel("Highest / mean load")
    _style(shades, history)
    _map(shades, x, history.max_loads)
    last = np.flatnonzero(np.isfinite(worst))[-1]
    dead = history.steps["moe_dead"][last]
    caption = (
        "Tokens of the expert that has the most, over the mean of its layer; 1 is even. Left: the worst layer. Right: "
        f"each layer with routed experts, means over steps; darker is less even. At the end {worst[last]:.2f} in the "
        f"worst layer, entropy of the loads {percent(float(history.steps['moe_entropy'][last]))} of its maximum, "
        f"{dead:.0f} experts without a token."
    )
    return Drawing("expert_loads", "Loads of experts", caption, figure, wide=True)


def _map(axes: Axes, x: np.ndarray, values: np.ndarray) -> None:
    """A row for each column of values, the first on top; x: where each step ends. One colour in several opacities, so
    that the page can change it in dark mode."""
    bounds = np.array([limit for limit, _ in _SHADES])
    cells: list[list[tuple[float, float, int]]] = [[] for _ in _SHADES]  # left, right, row
    for steps in np.array_split(np.arange(len(x)), min(_INTERVALS, len(x))):
        left, right = (x[steps[0] - 1] if steps[0] else 0.0), x[steps[-1]]
        for row, column in enumerate(values[steps].T):
            if len(known := column[np.isfinite(column)]):
                shade = cells[np.searchsorted(bounds, known.mean())]
                # One rectangle for neighbours of one shade keeps the page small.
                before = next((cell for cell in shade if cell[1:] == (left, row)), None)
                if before is not None:
                    shade.remove(before)
                shade.append((left if before is None else before[0], right, row))
    names = [f"up to {limit:g}" for limit in bounds[:-1]] + [f"above {bounds[-2]:g}"]
    handles = []
    for (_, opacity), found, name in zip(_SHADES, cells, names, strict=True):
        style = {"facecolor": _SECOND, "edgecolor": "none", "alpha": opacity}
        handles.append(Patch(**style, label=name))
        if found:
            corners = [[(a, r + 0.5), (b, r + 0.5), (b, r + 1.5), (a, r + 1.5), (a, r + 0.5)] for a, b, r in found]
            axes.add_patch(PathPatch(Path.make_compound_path(*map(Path, corners)), **style))
    axes.grid(False)
    axes.set_ylim(values.shape[1] + 0.5, 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("Layer with experts")
    where = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 4, "borderaxespad": 0.2}
    axes.legend(handles=handles, **where, frameon=False, fontsize=7, labelcolor=INK, handlelength=1.2, columnspacing=1)


def _figure(history: History, size: tuple[float, float], tokens: np.ndarray | None = None):
    figure = canvas(size)
    axes = figure.subplots()
    return figure, axes, _style(axes, history, tokens)


def _style(axes: Axes, history: History, tokens: np.ndarray | None = None) -> np.ndarray:
    """Set up axes with tokens along x, with the same scale in all plots; the x of the steps or of `tokens`."""
    last = float(history.steps["tokens"].max())
    if len(history.validation["tokens"]):
        last = max(last, float(history.validation["tokens"].max()))
    power, word = power_of(last)
    plain_axes(axes)
    axes.set_xlim(0, last / power or 1)
    axes.margins(x=0)
    axes.set_xlabel(f"Tokens ({word})" if word else "Tokens")
    return (history.steps["tokens"] if tokens is None else tokens) / power


def _line(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    name: str,
    *,
    color: str = _LINE,
    width: float = 1.6,
    dots: bool = False,
) -> None:
    """A curve whose values are shown under the pointer.

    Args:
        dots: mark up to 40 values.
    """
    x, y = thin(x, y, _SHOWN)
    # Short runs get dots too: a value between two missing ones makes no line.
    size = 4 if dots and len(y) <= 40 else 3 if len(y) < 20 else 0
    clip = len(y) >= 20 and not dots
    (line,) = axes.plot(x, y, color=color, linewidth=width, marker="o", markersize=size, clip_on=clip, label=name)
    hover(line, name)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, name: str) -> None:
    """All values as a thin line under the smoothed curve; fewer than 20 values unsmoothed."""
    if len(y) < 20:
        _line(axes, x, y, name)
        return
    _line(axes, x, y, f"{name}, each step", color=RAW, width=0.8)
    axes.lines[-1].set_label("_")  # not in the legend
    _line(axes, x, _smoothed(y), name)


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Fewer than 20 values are not smoothed."""
    return y if len(y) < 20 else smooth(y, half_life(len(y)))


def _robust_top(values: np.ndarray) -> float:
    """The upper limit of the axis: the largest value, unless outliers would make the rest a flat line."""
    high, middle = np.percentile(values, [98, 50])
    limit = high + 2 * (high - middle)
    return float(values.max() if values.max() <= limit or limit <= middle else limit)


def _log_scale(axes: Axes, positive: np.ndarray) -> None:
    axes.set_yscale("log")
    decades = np.log10(positive.max() / positive.min())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2.5 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
