"""From benchmarks/train_step.py through record_steps.py to the table of docs/results.md."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import record_steps, train_step
from scripts.training_section import training_section
from tests.benchmarks.test_steps import GPT, TINY


@pytest.fixture
def measured(tmp_path, monkeypatch):
    def run(*overrides: str) -> Path:
        out = tmp_path / "step.json"
        command = [str(GPT), *TINY, *overrides, "--vocab-size", "61", "--repeats", "1", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", ["benchmarks/train_step.py", *command])
        train_step.main()
        result = json.loads(out.read_text())
        result["environment"]["git_commit"] = "0123456789"
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(result))
        return path

    return run


def test_a_table_of_what_was_measured(measured):
    files = {"one layer": measured(), "two layers": measured("model.n_layers=2")}
    tables = record_steps.recorded([{"title": "other", "rows": []}], "layers", files, "a remark")
    assert [table["title"] for table in tables] == ["other", "layers"]
    one, two = tables[1]["rows"]
    assert "--json" not in one["command"] and two["command"].endswith(" model.n_layers=2 --vocab-size 61 --repeats 1")
    assert two["parameters"] > one["parameters"]
    page = training_section(tables[1:])
    first, second = (line for line in page.splitlines() if " layer" in line and line.startswith("| "))
    assert "| 1.00× |" in first and f"| {two['tokens_per_second'] / one['tokens_per_second']:.2f}× |" in second
    assert page.endswith("\na remark\n") and "commit 0123456." in page


def test_the_same_title_is_replaced(measured):
    path = measured()
    tables = record_steps.recorded([], "t", {"a": path}, None)
    tables = record_steps.recorded(tables, "t", {"b": path}, None)
    assert [row["label"] for table in tables for row in table["rows"]] == ["b"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no recipe: name a file that benchmarks/train_step.py --json wrote"):
        record_steps.recorded([], "t", {"a": path}, None)
