"""Tables in the terminal: every column at any width."""

import re

import pytest

from fusedlm.cli.compare import _print_table
from fusedlm.compare.tables import split_columns, summary_table

HEAD = ("variant", "parameters", "validation, nats per token", "bits per byte", "state at 64k", "decode/s at 64k")
ROWS = [
    ("mla", "1.12 M", "4.8187 ± 0.0253", "1.8867 ± 0.0099", "80 MiB", "35.9"),
    ("a-variant-with-a-name-as-long-as-they-may-be", "1.12 M", "4.7970 ± 0.0288", "1.88 ± 0.01", "198 KiB", "229"),
]


@pytest.mark.parametrize("columns", [36, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_cell_is_lost(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    _print_table("pair", HEAD, ROWS)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    for row in ROWS:
        for cell in row[1:]:
            assert len(re.findall(rf"(?<!\S){re.escape(cell)}(?!\S)", out)) == sum(r.count(cell) for r in ROWS), cell
    for word in " ".join(HEAD[1:]).split():
        assert word in out
    assert "…" not in out and out.count("pair") == 1


def test_a_file_has_one_table_of_any_width(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    _print_table("pair", HEAD, ROWS)
    out = capsys.readouterr().out
    assert out.count("variant ") == 1 and ROWS[1][0] in out
    assert all(any(cell in line for line in out.splitlines()) for row in ROWS for cell in row)


def test_parts_have_all_columns_once_and_the_first_in_each(finished):
    head, rows = summary_table(finished[0].results)
    parts = split_columns(head, rows, 60)
    assert len(parts) > 1 and [name for part, _ in parts for name in part[1:]] == list(head[1:])
    assert all(part[0] == "variant" and len(found) == len(rows) for part, found in parts)
    assert split_columns(head, rows, 1000) == [(head, rows)] == split_columns(head, rows, None)
