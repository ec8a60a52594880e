"""The plots of a run, as PNG."""

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fusedlm.report.history import History, half_life, median, smooth, thin
from fusedlm.report.style import FULL, HALF, INK, MUTED, PALETTE, Plot, canvas, padded, plain_axes, png
from fusedlm.report.units import count, memory, memory_unit, percent, power_of

_RAW, _LINE, _SECOND = "#a9c4e6", "#1f5fad", "#c9762b"


def draw_plots(history: History) -> list[Plot]:
    """The plots for which the run has values."""
    draw = (_loss, _validation, _optimization, _throughput, _memory, _layer_losses, _routing)
    plots = [one(history) for one in draw]
    return [plot for plot in plots if plot is not None]


def _loss(history: History) -> Plot | None:
    loss = history.steps["loss"]
    if not np.isfinite(loss).any():
        return None
    figure, axes, x = _figure(history, FULL)
    _curve(axes, x, loss)
    axes.set_ylabel("Loss (nats per token)")
    values = loss[np.isfinite(loss)]
    top = _robust_top(values)
    above = int((values > top).sum())
    low, high = values.min(), min(values.max(), top)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    if len(loss) < 20:
        caption = "The loss of each step."
    else:
        smoothed = smooth(loss, half_life(len(loss)))
        last = smoothed[np.isfinite(smoothed)][-1]
        caption = (
            f"Each step (thin) and a two-sided exponential average with a half-life of {half_life(len(loss))} steps "
            f"(bold), which ends at {last:.3f}."
        )
    if above:
        caption += f" {above} {'value lies' if above == 1 else 'values lie'} above the plot, up to {values.max():.3g}."
    return Plot("loss", "Training loss", caption, png(figure), wide=True)


def _validation(history: History) -> Plot | None:
    bpb = history.validation["val_bpb"]
    if not np.isfinite(bpb).any():
        return None
    figure, axes, x = _figure(history, HALF, history.validation["tokens"])
    averaged = history.validation["val_bpb_ema"]
    dots = {"linewidth": 1.6, "marker": "o", "markersize": 4 if len(bpb) <= 40 else 0, "clip_on": False}
    if np.isfinite(averaged).any():
        axes.plot(x, averaged, color=_SECOND, label="averaged weights", **dots)
    axes.plot(x, bpb, color=_LINE, label="weights as trained", **dots)
    if np.isfinite(averaged).any():
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    best = int(np.nanargmin(bpb))
    axes.plot(x[best : best + 1], bpb[best : best + 1], color=_LINE, marker="o", markersize=7, clip_on=False)
    axes.set_ylabel("Bits per byte")
    both = np.concatenate([bpb, averaged])
    axes.set_ylim(*padded(np.nanmin(both), np.nanmax(both)))
    caption = f"Held-out text{_windows(history)}; the best, {bpb[best]:.4f} at step "
    caption += f"{history.validation['step'][best]:.0f}, is marked."
    return Plot("validation", "Validation bits per byte", caption, png(figure))


def _windows(history: History) -> str:
    """Window and stride of the validations; empty if they are not recorded or not the same in all."""
    window, stride = (np.unique(history.validation[name]) for name in ("val_window", "val_stride"))
    if len(window) != 1 or len(stride) != 1 or not np.isfinite([window[0], stride[0]]).all():
        return ""
    return f" (window {window[0]:.0f}, stride {stride[0]:.0f})"


def _optimization(history: History) -> Plot | None:
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
            _line(axes, x, lr)
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            axes.yaxis.get_offset_text().set(fontsize=7.5, color=MUTED)
            axes.set_ylabel("Learning rate")
        else:
            _curve(axes, x, norm)
            positive = norm[np.isfinite(norm) & (norm > 0)]
            if len(positive) and positive.max() > 20 * positive.min():
                _log_scale(axes, positive)
            axes.set_ylabel("Gradient norm")
    figure.align_ylabels()
    caption = "The gradient norm is that of all gradients, before clipping."
    if "norm" not in shown:
        caption = "The learning rate of each step."
    return Plot("optimization", "Learning rate and gradient norm", caption, png(figure))


def _throughput(history: History) -> Plot | None:
    rate, mfu = history.steps["tokens_per_second"], history.steps["mfu"]
    typical = median(rate)
    if typical is None:
        return None
    power, word = power_of(typical)
    figure, axes, x = _figure(history, HALF)
    _line(axes, x, rate / power, color=_RAW, width=1.0)
    axes.axhline(typical / power, color=_LINE, linewidth=1.6)
    axes.set_ylim(0, 1.1 * _robust_top(rate[np.isfinite(rate)]) / power or 1)
    axes.set_ylabel(f"Tokens per second ({word})" if word else "Tokens per second")
    caption = f"Each step, and the median of {count(typical)} tokens per second"
    if (utilisation := median(mfu)) is not None:
        caption += f", which is {percent(utilisation)} of the device's peak FLOP/s"
    return Plot("throughput", "Throughput", caption + ".", png(figure))


def _memory(history: History) -> Plot | None:
    used = history.steps["peak_memory_bytes"]
    if not np.isfinite(used).any():
        return None
    highest = float(np.nanmax(used))
    size, unit = memory_unit(highest)
    figure, axes, x = _figure(history, HALF)
    _line(axes, x, used / size)
    axes.set_ylim(0, 1.15 * highest / size or 1)
    axes.set_ylabel(f"Peak memory ({unit})")
    return Plot("memory", "Memory", f"Peak memory up to each step; {memory(highest)} at most.", png(figure))


def _layer_losses(history: History) -> Plot | None:
    losses = {name: loss for name, loss in history.layer_losses.items() if np.isfinite(loss).any()}
    if not losses:
        return None
    figure, axes, x = _figure(history, HALF)
    for (name, loss), color in zip(losses.items(), itertools.cycle(PALETTE)):
        _line(axes, x, _smoothed(loss), color=color)
        axes.lines[-1].set_label(name)
    values = np.concatenate(list(losses.values()))
    axes.set_ylim(*padded(np.nanmin(values), np.nanmax(values)))
    axes.set_ylabel("Weighted loss")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    caption = "Losses of layers with their weights, which the training loss does not include."
    return Plot("layer_losses", "Losses of layers", caption, png(figure))


def _routing(history: History) -> Plot | None:
    share, budget = history.steps["routed_flops_share"], history.steps["routed_budget"]
    if not np.isfinite(share).any():
        return None
    figure = canvas(FULL)
    levels, compute = figure.subplots(1, 2)
    x = _style(levels, history)
    for name, color in (("light", _RAW), ("blend", _SECOND), ("full", _LINE)):
        _line(levels, x, _smoothed(history.steps[f"routed_{name}"]), color=color)
        levels.lines[-1].set_label(name)
    levels.set_ylabel("Share of tokens")
    _style(compute, history)
    _curve(compute, x, share)
    compute.lines[-1].set_label("computed")
    _line(compute, x, budget, color=MUTED, width=1.0)
    compute.lines[-1].set(linestyle=(0, (4, 3)), label="budget")
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
    return Plot("routing", "Levels of the routed feed-forward", caption, png(figure), wide=True)


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


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str = _LINE, width: float = 1.6) -> None:
    x, y = thin(x, y)
    # Short runs get dots too: a value between two missing ones makes no line.
    axes.plot(x, y, color=color, linewidth=width, marker="o", markersize=3 if len(y) < 20 else 0, clip_on=len(y) >= 20)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """All values as a thin line under the smoothed curve; fewer than 20 values unsmoothed."""
    if len(y) < 20:
        _line(axes, x, y)
        return
    _line(axes, x, y, color=_RAW, width=0.8)
    _line(axes, x, _smoothed(y))


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
