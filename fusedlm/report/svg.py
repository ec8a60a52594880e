"""Figures as SVG inside a page: colours by CSS variables, small, and with the values of their curves for hovering."""

import io
import json
import re
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_POINTS = 400  # most values of a curve for hovering
_HOVER = "hover_texts"


@dataclass(frozen=True)
class Inline:
    """An SVG element without its opening tag, and what the script of a page needs."""

    width: float  # of the view box
    height: float
    content: str  # inside of <svg>
    axes: list[dict]  # of each axes with curves: "box" (left, top, width, height), "x" and "y" (low, high, is log)
    curves: list[list]  # of each of these axes, [label, colour variable, x, y, texts or null] of each curve
    labels: list[str]  # name of x, of each of these axes


def hover(line: Line2D, label: str, texts: list[str] | None = None) -> None:
    """Show the values of a line under the pointer.

    Args:
        texts: of each value; None: the number.
    """
    setattr(line, _HOVER, (label, texts))


def inline(figure: Figure, name: str, theme: dict[str, str | None]) -> Inline:
    """A figure as SVG.

    Args:
        name: unique in the page; makes ids unique.
        theme: hex colour -> CSS variable, or None for transparent.
    """
    out = io.BytesIO()
    # Text stays text: it is small, can be selected, and has the page's font. A fixed salt gives the same ids each time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue().decode("utf-8")
    width, height = 72 * figure.get_figwidth(), 72 * figure.get_figheight()
    axes, curves, labels = _hovering(figure, height, theme)
    return Inline(width, height, _content(text, theme), axes, curves, labels)


def _content(text: str, theme: dict[str, str | None]) -> str:
    """What is inside of the svg element, without what a page does not need."""
    text = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(
        r'(style="[^"]*")', lambda found: re.sub(r"#[0-9a-f]{6}\b", lambda c: _variable(c[0], theme), found[0]), text
    )
    # Only numbers of paths and places: texts and styles keep theirs.
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"-?\d+\.\d+", _rounded, found[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _variable(colour: str, theme: dict[str, str | None]) -> str:
    if colour not in theme:
        return colour
    name = theme[colour]
    return "none" if name is None else f"var(--{name})"


def _rounded(number: re.Match) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _hovering(figure: Figure, height: float, theme: dict[str, str | None]) -> tuple[list, list, list]:
    axes_found, curves, labels = [], [], []
    scale = 72 / figure.dpi
    names = [axes.get_xlabel() for axes in figure.axes]
    for axes in figure.axes:
        lines = [line for line in axes.lines if hasattr(line, _HOVER)]
        if not lines:
            continue
        box = axes.get_window_extent()
        axes_found.append(
            {
                "box": [round(v, 1) for v in (box.x0 * scale, height - box.y1 * scale, box.width * scale)]
                + [round(box.height * scale, 1)],
                "x": [*map(_number, axes.get_xlim()), axes.get_xscale() == "log"],
                "y": [*map(_number, axes.get_ylim()), axes.get_yscale() == "log"],
            }
        )
        curves.append([_curve(line, theme) for line in lines])
        labels.append(axes.get_xlabel() or next(filter(None, reversed(names)), ""))
    return axes_found, curves, labels


def _curve(line: Line2D, theme: dict[str, str | None]) -> list:
    label, texts = getattr(line, _HOVER)
    x, y = (np.asarray(values, dtype=np.float64) for values in line.get_data())
    kept = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(kept) > _POINTS:
        kept = kept[np.linspace(0, len(kept) - 1, _POINTS).round().astype(int)]
    colour = theme.get(line.get_color()) or "ink"
    shown = None if texts is None else [texts[i] for i in kept]
    return [label, colour, [_number(v) for v in x[kept]], [_number(v) for v in y[kept]], shown]


def _number(value: float) -> float:
    return float(f"{value:.5g}")


def as_json(value) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
