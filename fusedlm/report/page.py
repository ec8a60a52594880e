"""The HTML of a report: one file, no external resources; its script only shows values under the pointer."""

from dataclasses import dataclass, field
from html import escape

from fusedlm.report.assets import SCRIPT, STYLE
from fusedlm.report.style import Plot
from fusedlm.report.svg import Inline, as_json
from fusedlm.report.text import clean


@dataclass
class Page:
    """The content of a page. Texts are plain, and escaped when rendered."""

    title: str
    description: str
    key_figures: list[tuple[str, str, str]]  # (name, value, remark)
    plots: list[Plot]
    facts: list[tuple[str, str]] = field(default_factory=list)  # in the header: (name, value)
    notes: list[str] = field(default_factory=list)
    validation_head: tuple[str, ...] = ()
    validation: list[tuple[str, ...]] = field(default_factory=list)
    best_row: int | None = None
    tasks_head: tuple[str, ...] = ()
    tasks: list[tuple[str, ...]] = field(default_factory=list)
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
        *section("Tasks", numbers_table(page.tasks_head, page.tasks) if page.tasks else None),
        *section("Sample", f'<div class="sample">{escape(page.sample)}</div>' if page.sample else None),
        *section("Environment", facts_table(page.environment)),
        *section("Recipe", f"<pre>{escape(page.recipe)}</pre>" if page.recipe else None),
    ]
    return document(page.title, page.description, page.facts, body, page.version)


def document(title: str, description: str, facts: list[tuple[str, str]], body: list[str], version: str) -> str:
    """A full page around HTML parts; title, description and facts are plain text."""
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} – fusedlm</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{escape(title)}</h1>",
        *([f"<p>{escape(description)}</p>"] if description else []),
        *([f"<dl>{entries}</dl>"] if entries else []),
        "</header>",
        *body,
        f"<footer>fusedlm {escape(version)}</footer>",
        f"<script>{SCRIPT}</script>",
        "</body>",
        "</html>",
    ]
    return clean("\n".join(parts) + "\n")


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
    return _scrolling(
        f'<table class="numbers named"><thead><tr>{head_cells}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )


def _scrolling(table: str) -> str:
    """A table in a box of its own, in which it scrolls where the page is too narrow for it."""
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _key_figure(name: str, value: str, remark: str) -> str:
    small = f"<small>{escape(remark)}</small>" if remark else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"


def _figure(plot: Plot) -> str:
    drawn = [_svg("half", plot, plot.full)]
    if plot.narrow:
        drawn = [_svg("full", plot, plot.full), _svg("narrow", plot, plot.narrow)]
    data = ""
    if plot.full.curves:
        data = f' data-curves="{escape(as_json(plot.full.curves))}" data-labels="{escape(as_json(plot.full.labels))}"'
    return (
        f"<figure{' class=wide' if plot.wide else ''}{data}><h3>{escape(plot.title)}</h3>"
        f"{''.join(drawn)}<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _svg(kind: str, plot: Plot, drawn: Inline) -> str:
    """The curves are data of the figure; each drawing adds where its axes are."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {drawn.width:g} {drawn.height:g}" role="img" '
        f'aria-label="{escape(plot.title + ": " + plot.caption)}" data-axes="{escape(as_json(drawn.axes))}">'
        f"{drawn.content}</svg>"
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
    return text_table((), [(name, value) for name, value in rows]) if rows else None


def text_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of plain text, left-aligned, with names in the first column."""
    top = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return _scrolling(f'<table class="facts">{top}<tbody>{body}</tbody></table>')
