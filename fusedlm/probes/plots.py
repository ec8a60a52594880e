"""The plots of the probes, as PNG."""

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fusedlm.probes.extend import max_multiple_of
from fusedlm.report.style import FULL, HALF, INK, MUTED, PALETTE, canvas, padded, plain_axes, png

_PANEL = (3.0, 2.6)  # inches of one heat map
_PANELS_PER_ROW = 3


def recall_plot(series: dict[str, list[dict]]) -> bytes:
    """Accuracy against the number of pairs, one line per model; dashed: guessing among the values of the sequence.

    Args:
        series: `accuracy` of results of `probe_mqar`, by model.
    """
    figure = canvas(FULL if len(series) > 1 else HALF)
    axes = figure.subplots()
    for (name, points), color in zip(series.items(), _cycle(len(series)), strict=True):
        x, y = [point["pairs"] for point in points], [point["accuracy"] for point in points]
        axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=4, label=name, clip_on=False)
    guesses = sorted({(point["pairs"], point["guess"]) for points in series.values() for point in points})
    axes.plot(*zip(*guesses, strict=True), color=MUTED, linewidth=1.0, linestyle="--", label="guessing a value")
    axes.set_xlabel("Pairs")
    axes.set_ylabel("Accuracy")
    plain_axes(axes)
    pairs = [guess[0] for guess in guesses]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(pairs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    _legend(axes, outside=len(series) > 1)
    return png(figure)


def needle_plot(results: dict[str, dict]) -> bytes:
    """Heat maps of length (x) and depth (y): accuracy and gain of one model, or the accuracy of each of several.

    Args:
        results: of `probe_needle`, by model.
    """
    panels = [(name, result, "accuracy") for name, result in results.items()]
    if len(panels) == 1:
        result = panels[0][1]
        panels = [("Accuracy", result, "accuracy"), ("Gain, nats per token", result, "gain")]
    columns = min(_PANELS_PER_ROW, len(panels))
    rows = -(-len(panels) // columns)
    figure = canvas((_PANEL[0] * columns, _PANEL[1] * rows))
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, result, value) in zip(every, panels, strict=False):
        most = max(cell[value] for cell in result["cells"])
        _heat_map(axes, result, value, 1.0 if value == "accuracy" else max(most, 1.0))
        axes.set_title(title, fontsize=9, color=INK)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    return png(figure)


def extend_plot(result: dict) -> bytes:
    """Bits per byte against position, one line without YaRN and one per factor.

    Each point is an average over the training length before it. Windows start one training length apart, so that the
    text of a full training length is the same at every position, and that of a part of it is not.

    Args:
        result: of `probe_extend`.
    """
    figure = canvas(FULL)
    axes = figure.subplots()
    trained, n_bytes = result["trained_length"], np.array(result["bytes"])
    multiple = max_multiple_of(result)
    per_length = len(n_bytes) // multiple
    position = np.array(result["ends"])[per_length - 1 :] / trained
    values = []
    for curve, color in zip(result["curves"], _cycle(len(result["curves"])), strict=True):
        name = "unstretched" if curve["yarn"] is None else f"YaRN, factor {curve['yarn']:g}"
        values.append(_rolling(curve["bpb"] * n_bytes, per_length) / _rolling(n_bytes, per_length))
        axes.plot(position, values[-1], color=color, linewidth=1.6, marker="o", markersize=2.5, label=name)
    axes.set_xlabel(f"Position in training lengths of {trained:,} tokens")
    axes.set_ylabel("Bits per byte, over one training length")
    plain_axes(axes)
    axes.set_xlim(1 - 0.02 * multiple, multiple * 1.02)
    axes.xaxis.set_major_locator(FixedLocator(range(1, multiple + 1)))
    axes.set_ylim(*padded(np.min(values), np.max(values)))
    _legend(axes, outside=True)
    return png(figure)


def coordinates_plot(result: dict) -> bytes:
    """Mean |x| after the last step against width, a line per kind of module; without muP and with it.

    Args:
        result: of `probe_coordinates`.
    """
    panels = {"Standard parametrisation": "standard", f"muP, base width {result['base_width']}": "mup"}
    figure = canvas((2 * _PANEL[0] + 2.2, _PANEL[1] + 0.5))
    every, widths = figure.subplots(1, 2, sharey=True), result["widths"]
    for axes in every:
        plain_axes(axes)
    for axes, (title, name) in zip(every, panels.items(), strict=True):
        kinds = result["values"][name]
        for (kind, series), color in zip(kinds.items(), _cycle(len(kinds)), strict=True):
            y = [np.nan if values[-1] is None else values[-1] for values in series]
            axes.plot(widths, y, color=color, linewidth=1.4, marker="o", markersize=3, label=kind)
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_xlabel("Width")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(widths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    every[0].set_ylabel(f"Mean |x| after {result['steps']} steps")
    _legend(every[1], outside=True)
    return png(figure)


def _rolling(values: np.ndarray, size: int) -> np.ndarray:
    """Sums of each `size` consecutive values."""
    return np.convolve(values, np.ones(size), mode="valid")


def _heat_map(axes, result: dict, value: str, most: float) -> None:
    lengths = sorted({cell["length"] for cell in result["cells"]})
    depths = sorted({cell["depth"] for cell in result["cells"]})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in result["cells"]:
        grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell[value]
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    for row, column in np.ndindex(*grid.shape):
        text = f"{grid[row, column]:.0%}" if value == "accuracy" else f"{grid[row, column]:.1f}"
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if grid[row, column] > 0.6 * most else INK,
        )
    axes.set_xticks(range(len(lengths)), [f"{length / result['trained_length']:g}×" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("Length", fontsize=8.5, color=INK)
    axes.set_ylabel("Depth", fontsize=8.5, color=INK)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=7.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(axes, *, outside: bool) -> None:
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if outside else {"loc": "best"}
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, **place)


def _cycle(n: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(n)]
