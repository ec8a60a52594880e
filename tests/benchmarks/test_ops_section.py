"""The tables of docs/results.md on operations, from records of today and of before."""

import copy

import pytest

from benchmarks.harness import Ceilings, Measured
from benchmarks.run import _lines
from scripts.ops_section import draw_ops, ops_section

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "device_name": "a GPU",
    "python": "3.12",
    "torch": "2.11",
    "triton": "3.6",
    "git_commit": "0123456789",
}
RATES = vars(Ceilings(bytes_per_second=3e12, flops_per_second=7e14))
CONTENDERS = [
    Measured("eager", [1e-3, 2e-3], 2.0, 10.0, None, 0.5),
    Measured("Liger", [2e-3, 4.56e-2], 0.5, 4.0, None, 11.4),
    Measured("cut cross entropy", [], None, 3.0, "NaN or infinity"),
    Measured("fusedlm", [1e-3, 1e-3], 0.25, 0.0, None, 0.25),
]


@pytest.fixture
def record():
    case = {"op": "an_op", "shape": "4 × 8", "dtype": "bfloat16", "direction": "forward", "floor_ms": 0.2}
    cases = [case | {"contenders": [dict(vars(one)) for one in CONTENDERS]}]
    return {"command": "python benchmarks/run.py", "environment": ENVIRONMENT, "ceilings": RATES, "cases": cases}


def _rows(page):
    return [line for line in page.splitlines() if line.startswith("| ")]


def test_a_less_exact_peer_has_its_time_with_a_mark_and_its_error(record):
    page = ops_section([record], None)
    assert _rows(page)[1:] == [
        "| 4 × 8, bfloat16 | forward | eager | 2.0000 | 10% | 10 | 2.0e-03 |",
        "|  |  | Liger | 0.5000 † | 40% | 4 | 4.6e-02, up to 11× the bound |",
        "|  |  | cut cross entropy | NaN or infinity | – | 3 | – |",
        "|  |  | **fusedlm** | 0.2500 | 80% | 0 | 1.0e-03 |",
    ]
    assert "† marks a peer whose error against float64 is more than twice that of eager PyTorch." in page


def test_a_record_from_before_is_read(record):
    """There a contender beyond the bound was called wrong and had no time."""
    for one in record["cases"][0]["contenders"]:
        del one["error_over_bound"]
    record["cases"][0]["contenders"][1] |= {"milliseconds": None, "reason": "wrong"}
    page = ops_section([record], None)
    assert _rows(page)[2] == "|  |  | Liger | wrong | – | 4 | 4.6e-02 |"
    assert "†" not in page and "is wrong and has no time" in page


def test_steps_are_read_by_either_name(record):
    step = {"tokens_per_second": 1000.0, "mfu": 0.5, "peak_memory_gib": 2.0}
    variants = {"fused": step | {"tokens_per_second": 1100.0}, "reference": step}
    new = {"command": "c", "environment": ENVIRONMENT, "cases": [{"name": "gpt", "variants": variants}]}
    old = copy.deepcopy(new)
    old["cases"][0]["ways"] = old["cases"][0].pop("variants")
    assert ops_section([], new) == ops_section([], old)
    assert "| gpt | fused | 1,100 | 1.100× | 50.0% | 2.00 GiB |" in ops_section([], new)


def test_bars_have_their_milliseconds_and_the_chart_its_hardware(record, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn = []

    def save(figure, path, **options):
        drawn.append((path.name, {text.get_text() for text in figure.findobj(Text)}, figure.axes[0]))

    monkeypatch.setattr(Figure, "savefig", save)
    draw_ops(record, tmp_path)
    ((name, texts, axes),) = drawn
    bars = axes.patches
    assert name == "ops-an_op.png" and [bar.get_width() for bar in bars] == [2.0, 0.5, 0.25]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["eager", "Liger", "fusedlm"]
    assert [bool(bar.get_hatch()) for bar in bars] == [False, True, False], "the less exact one"
    peer, other, ours = (bar.get_facecolor() for bar in bars)
    assert peer == other != ours
    (floor,) = axes.lines
    assert list(floor.get_xdata()) == [0.2, 0.2]
    assert {" 2.00 ms, 10% of the floor", " 0.500 ms, 40% of the floor", " 0.250 ms, 80% of the floor"} <= texts
    assert any("an_op on a GPU, torch 2.11, 2026-01-02" in text and "hatched" in text for text in texts)
    assert "4 × 8, bfloat16, forward" in texts and "cut cross entropy" not in texts


def test_a_run_prints_the_error_beside_the_time(record):
    lines = _lines(record["cases"][0]).splitlines()
    assert "0.5000 ms" in lines[2] and "error 4.6e-02, less exact: up to 11 times the bound" in lines[2]
    assert "NaN or infinity" in lines[3] and "less exact" not in lines[1]


def test_records_follow_each_other_each_with_its_title(record):
    other = copy.deepcopy(record) | {"title": "Others", "note": "Made elsewhere."}
    other["cases"][0]["op"] = "another_op"
    page = ops_section([record, other], None)
    assert page.index("# Operations") < page.index("## an_op") < page.index("# Others") < page.index("## another_op")
    assert page.count("The floor is the time of the fewest bytes") == 1 and page.endswith("\nMade elsewhere.\n")
    assert ops_section([], None) == ""
