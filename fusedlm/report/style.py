"""The style of the plots of all reports."""

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, FAINT = "#24292f", "#6e7781", "#d8dee4"
# Chosen to be distinct in print and with colour blindness (after Okabe and Ito).
PALETTE = (
    "#1f5fad",
    "#c9762b",
    "#1d8a6c",
    "#b0457e",
    "#7a6fc4",
    "#a39a1f",
    "#4aa3d6",
    "#8c4b2a",
    "#5b6570",
    "#d1495b",
)
FULL, HALF = (9.2, 3.3), (4.5, 3.1)  # inches
DPI = 200  # twice the resolution of the page


@dataclass(frozen=True)
class Plot:
    name: str  # of the file, without .png
    title: str
    caption: str  # plain text
    png: bytes
    wide: bool = False


def canvas(size: tuple[float, float]) -> Figure:
    """An empty figure that needs no display."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes) -> None:
    """Two spines, a horizontal grid, few ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=3, width=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.label.set(fontsize=8.5, color=INK)
    axes.yaxis.label.set(fontsize=8.5, color=INK)


def padded(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis a little beyond the values."""
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    # Without matplotlib's version, so that the same run gives the same file.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
