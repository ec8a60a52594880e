"""The HTML of a report: one file, no scripts, no external resources."""

import base64
from dataclasses import dataclass, field
from html import escape

from fusedlm.report.style import Plot

# Plots are drawn on white. In dark mode they are inverted, with their hues restored, and blended into the page.
_STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --muted: #656d76; --line: #d8dee4; --page: #fff; --soft: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d9dee4; --muted: #8d96a0; --line: #30363d; --page: #101418; --soft: #171c22; }
  figure img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 61rem; padding: 3rem 1.5rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.75rem; font-weight: 600; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 0.75rem; font-size: 1.05rem; font-weight: 600; }
header p { margin: 0.35rem 0 0; max-width: 44rem; color: var(--muted); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1.4rem 1.5rem;
  margin: 2rem 0 0; padding: 1.4rem 0; border: solid var(--line); border-width: 1px 0; }
.figures div { display: flex; flex-direction: column; }
dt { color: var(--muted); font-size: 0.8rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; white-space: nowrap; }
dd small { color: var(--muted); font-size: 0.8rem; letter-spacing: 0; white-space: normal; display: block; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2.2rem 1.5rem; margin-top: 2.2rem; }
.plots .wide { grid-column: 1 / -1; }
figure { margin: 0; }
figure h3 { margin: 0 0 0.4rem; font-size: 0.95rem; font-weight: 600; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 0.4rem; color: var(--muted); font-size: 0.85rem; }
pre { margin: 0; padding: 1rem 1.2rem; background: var(--soft); border-radius: 6px; overflow-x: auto;
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 44rem; padding-left: 1.1rem;
  border-left: 2px solid var(--line); font-family: Charter, Georgia, "DejaVu Serif", serif; font-size: 1rem; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 1.6rem 0.28rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { color: var(--muted); font-weight: 400; text-align: left; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.numbers th, .numbers td { text-align: right; padding: 0.28rem 0 0.28rem 2.2rem; white-space: nowrap; }
.numbers th:first-child, .numbers td:first-child { padding-left: 0; }
.named .numbers th, .named .numbers td { padding-left: 1.5rem; }
.named .numbers th:first-child, .named .numbers td:first-child { padding-left: 0; text-align: left; }
.wide-table { overflow-x: auto; margin-bottom: 1.2rem; }
section ul { padding-left: 1.2rem; }
.best td { font-weight: 600; }
details summary { margin: 3rem 0 0.75rem; cursor: pointer; }
details summary h2 { display: inline; }
footer { margin-top: 3.5rem; color: var(--muted); font-size: 0.8rem; }
@media (max-width: 44rem) { .plots { grid-template-columns: minmax(0, 1fr); } body { padding-top: 1.5rem; } }
@media print { body { max-width: none; padding: 0; } figure { break-inside: avoid; } }
"""


@dataclass
class Page:
    """The content of a page. Texts are plain, and escaped when rendered."""

    title: str
    description: str
    key_figures: list[tuple[str, str, str]]  # (name, value, remark)
    plots: list[Plot]
    notes: list[str] = field(default_factory=list)
    validation_head: tuple[str, ...] = ()
    validation: list[tuple[str, ...]] = field(default_factory=list)
    best_row: int | None = None
    sample: str | None = None
    recipe: str | None = None
    environment: list[tuple[str, str]] = field(default_factory=list)
    version: str = ""


_FOLDED_ROWS = 12


def render(page: Page) -> str:
    """The page of a run."""
    body = [
        key_figures(page.key_figures),
        *(f"<p>{escape(note)}</p>" for note in page.notes),
        figures(page.plots),
        *_validation(page),
        *section("Sample", f'<div class="sample">{escape(page.sample)}</div>' if page.sample else None),
        *section("Environment", facts_table(page.environment)),
        *section("Recipe", f"<pre>{escape(page.recipe)}</pre>" if page.recipe else None),
    ]
    return document(page.title, page.description, body, page.version)


def document(title: str, description: str, body: list[str], version: str) -> str:
    """A full page around HTML parts; title and description are plain text."""
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} – fusedlm</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{escape(title)}</h1>",
        *([f"<p>{escape(description)}</p>"] if description else []),
        "</header>",
        *body,
        f"<footer>fusedlm {escape(version)}</footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def key_figures(entries: list[tuple[str, str, str]]) -> str:
    """The key figures at the top: (name, value, remark)."""
    return "\n".join(['<dl class="figures">', *(_key_figure(*entry) for entry in entries), "</dl>"])


def figures(plots: list[Plot]) -> str:
    return "\n".join(['<div class="plots">', *(_figure(plot) for plot in plots), "</div>"])


def numbers_table(head: tuple[str, ...], rows: list[tuple[str, ...]], *, bold_row: int | None = None) -> str:
    """A table of plain text, with right-aligned columns except for names in the first."""
    head_cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = [
        f"<tr{' class=best' if i == bold_row else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for i, row in enumerate(rows)
    ]
    return f'<table class="numbers"><thead><tr>{head_cells}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _key_figure(name: str, value: str, remark: str) -> str:
    small = f"<small>{escape(remark)}</small>" if remark else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.png).decode("ascii")
    return (
        f"<figure{' class=wide' if plot.wide else ''}><h3>{escape(plot.title)}</h3>"
        f'<img alt="{escape(plot.title + ": " + plot.caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def section(title: str, content: str | None) -> list[str]:
    """A heading and its HTML; nothing if content is None."""
    return [f"<section><h2>{escape(title)}</h2>", content, "</section>"] if content else []


def _validation(page: Page) -> list[str]:
    if not page.validation:
        return []
    table = numbers_table(page.validation_head, page.validation, bold_row=page.best_row)
    if len(page.validation) <= _FOLDED_ROWS:
        return section("Validations", table)
    return folded(f"All {len(page.validation)} validations", table)


def folded(title: str, content: str) -> list[str]:
    """A section that opens on a click."""
    return [f"<details><summary><h2>{escape(title)}</h2></summary>", content, "</details>"]


def facts_table(rows: list[tuple[str, str]]) -> str | None:
    """A table of names and values, plain text; None if there are none."""
    if not rows:
        return None
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table><tbody>{body}</tbody></table>"
