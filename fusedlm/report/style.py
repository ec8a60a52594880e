"""The style of the plots of all reports."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fusedlm.report.svg import Inline, inline

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
RAW = "#a9c4e6"  # of single values under a smoothed curve
# Colours of a page, which change in dark mode: hex -> (variable, colour in dark mode).
_DARK = (
    "#6ea8e8", "#e09a5a", "#4fc3a1", "#d77fb0", "#a9a0ea", "#cfc64a", "#7cc4ea", "#c48a66", "#9aa5b1", "#ee8a90",
)  # fmt: skip
_COLOURS = {INK: ("ink", "#d9dee4"), MUTED: ("soft-ink", "#8d96a0"), FAINT: ("line", "#30363d")} | {
    RAW: ("raw", "#3f5f86"),
    **{light: (f"c{i}", dark) for i, (light, dark) in enumerate(zip(PALETTE, _DARK, strict=True))},
}
THEME = {light: name for light, (name, _) in _COLOURS.items()} | {"#000000": "ink", "#ffffff": None}


def variables(dark: bool) -> str:
    """The colours as CSS variables."""
    return " ".join(f"--{name}: {other if dark else light};" for light, (name, other) in _COLOURS.items())


FULL, HALF, NARROW = (9.2, 3.3), (4.5, 3.1), (4.5, 3.3)  # inches; narrow: of a full plot on a phone
DPI = 200  # of the PNG files: twice the resolution of the page


@dataclass(frozen=True)
class Drawing:
    """A plot before it is written."""

    name: str
    title: str
    caption: str  # plain text
    figure: Figure
    wide: bool = False


@dataclass(frozen=True)
class Plot:
    name: str  # of the file, without .png
    title: str
    caption: str  # plain text
    png: bytes
    full: Inline
    narrow: Inline | None = None  # of a wide plot
    wide: bool = False


def plot(draw: Callable[[bool], Drawing | None]) -> Plot | None:
    """Draw a plot, and if it is wide a second time for narrow pages.

    Args:
        draw: of the argument `narrow`; None: there is nothing to draw.
    """
    # Names are text, not formulas: a "$" in them means itself.
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # an emoji in the name of a loss
        drawing = draw(False)
        if drawing is None:
            return None
        narrow = draw(True) if drawing.wide else None
        return Plot(
            drawing.name,
            drawing.title,
            drawing.caption,
            png(drawing.figure),
            inline(drawing.figure, drawing.name, THEME),
            narrow and inline(narrow.figure, f"{drawing.name}-narrow", THEME),
            drawing.wide,
        )


def wide_size(narrow: bool, height: float = FULL[1]) -> tuple[float, float]:
    """Inches of a plot that is as wide as the page."""
    return (NARROW[0], max(NARROW[1], height)) if narrow else (FULL[0], height)


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
    axes.ticklabel_format(useOffset=False)
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
    figure.set_layout_engine("none")  # found, and the same at any resolution
    return out.getvalue()
