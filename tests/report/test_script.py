"""The script of a page, run by Node.js on a page of a few objects: what is shown under the pointer, and in print."""

import json
import shutil
import subprocess

import pytest

from tests.report.test_report import parse, write_report, write_run

HARNESS = """
const element = (more) => ({
  children: [], style: {}, attributes: {}, offsetWidth: 50, listeners: {}, namespaceURI: 'svg',
  appendChild(child) { this.children.push(child); return child; },
  replaceChildren() { this.children = []; },
  setAttribute(name, value) { this.attributes[name] = value; },
  addEventListener(name, listener) { this.listeners[name] = listener; },
  getBoundingClientRect() { return {left: 10, top: 20, width: 2 * this.width, height: 100}; },
  ...more});
const {page, script, events} = JSON.parse(require('fs').readFileSync(0, 'utf-8'));
const svg = element({dataset: {axes: page.axes}, width: page.width, viewBox: {baseVal: {width: page.width}}});
const figure = element({dataset: {curves: page.curves, labels: page.labels}, width: page.width,
  querySelectorAll: (selector) => selector === 'svg' ? [svg] : []});
const folded = element({open: false}), heard = {};
globalThis.document = {
  createElement: () => element({}), createElementNS: () => element({}),
  querySelectorAll: (selector) => selector === 'figure[data-curves]' ? [figure]
    : selector === 'details:not([open])' && !folded.open ? [folded] : []};
globalThis.addEventListener = (name, listener) => { heard[name] = listener; };
new Function(script)();
const [tip] = figure.children, [rule] = svg.children;
console.log(JSON.stringify(events.map(([name, x, y]) => {
  if (name in heard) { heard[name](); return folded.open; }
  svg.listeners[name]({clientX: 10 + 2 * x, clientY: 20 + 2 * y});
  if (tip.hidden) return rule.style.display;
  const [head, ...rows] = tip.children;
  return {head: head.textContent, line: rule.attributes.x1, left: tip.style.left,
    rows: rows.map(({children: [dot, label, value]}) => [dot.style.background, label.textContent, value.textContent])};
})));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The script of a report, and the attributes of its first figure."""
    if shutil.which("node") is None:
        pytest.skip("needs Node.js")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusedlm.report.style.png", lambda figure: b"")
        page = parse(write_report(write_run(tmp_path_factory.mktemp("page") / "run")))
    figure, drawing = page.data[0][1], page.data[1][1]
    width = float(drawing["viewbox"].split()[2])
    data = {"curves": figure["data-curves"], "labels": figure["data-labels"], "axes": drawing["data-axes"]}
    return page.scripts[0], data | {"width": width}


def fire(page, *events):
    """What is shown after each event: (name, x, y in units of the drawing) or (name,)."""
    script, data = page
    content = json.dumps({"script": script, "page": data, "events": events})
    done = subprocess.run(["node", "-e", HARNESS], input=content, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_values_are_shown_under_the_pointer(page):
    """Of every series that has a value nearby; the run has 3,000 tokens, and is validated after each 1,000."""
    (axes,) = json.loads(page[1]["axes"])
    left, top, width, height = axes["box"]

    def at(tokens: int) -> float:
        return left + width * tokens / 3000

    validated, between, outside, touched, gone = fire(
        page,
        ("pointermove", at(2000) + 1, top + 5),
        ("pointermove", at(1520), top + height / 2),
        ("pointermove", at(1520), top + height + 10),
        ("pointerdown", at(1000), top + 5),
        ("pointerleave", 0, 0),
    )
    assert validated["head"] == "Tokens (thousands): 2" and validated["line"] == pytest.approx(at(2000))
    assert validated["rows"] == [
        ["var(--raw)", "training, each step", "3.2"],
        ["var(--c0)", "training", validated["rows"][1][2]],
        ["var(--c1)", "validation", "3"],
    ]
    assert float(validated["rows"][1][2]) == pytest.approx(3.2, abs=0.1)
    assert between["head"] == "Tokens (thousands): 1.5"
    assert [row[:2] for row in between["rows"]] == [["var(--raw)", "training, each step"], ["var(--c0)", "training"]]
    assert between["rows"][0][2] == f"{3 + 4 / 15:.4f}"
    assert (outside, gone) == ("none", "none")
    assert touched["head"] == "Tokens (thousands): 1" and len(touched["rows"]) == 3


def test_the_values_stay_inside_of_the_figure(page):
    """To the right of the pointer, or to its left where there is no space."""
    (axes,) = json.loads(page[1]["axes"])
    left, top, width, _ = axes["box"]
    first, last = fire(page, ("pointermove", left + 5, top + 5), ("pointermove", left + width, top + 5))
    assert float(first["left"][:-2]) > 2 * left
    assert float(last["left"][:-2]) + 50 < 2 * (left + width)


def test_folded_tables_are_printed(page):
    assert fire(page, ("beforeprint",), ("afterprint",)) == [True, False]
