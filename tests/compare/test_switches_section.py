"""The table of docs/results.md on switches that are turned off in one model and on in another."""

import pytest

from scripts.switches_section import difference, switches_section


def record(match: str, losses: dict[str, list[float | None]]) -> dict:
    keys = ("variant", "seed", "val_bpb")
    runs = [dict(zip(keys, (name, *pair), strict=True)) for name, row in losses.items() for pair in enumerate(row)]
    return {"name": "parts", "experiment": {"match": match}, "variants": dict.fromkeys(losses), "runs": runs}


LOSSES = {
    "full": [1.0, 1.1, 1.2],
    "no-skips": [1.1, 1.2, 1.3],  # 0.1 more with every seed
    "plain": [1.5, 1.5, 1.5],
    "only-skips": [1.4, 1.5, 1.6],  # in the mean the same
    "only-gate": [1.2, None, None],
}


def test_differences_are_paired_by_seed():
    found = record("params", LOSSES)
    assert difference(found, "no-skips", "full").mean == pytest.approx(0.1)
    assert difference(found, "only-gate", "plain").mean == pytest.approx(-0.3), "of the seed that both have"
    assert difference(found, "only-gate", "missing").n == 0


def test_a_row_per_switch_and_a_column_per_record():
    page = switches_section([record("params", LOSSES), record("time", LOSSES), {"name": "x", "variants": {"full": {}}}])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0][1:] == [f"{side}, equal {what}" for side in ("off, against full", "on, against plain")
                           for what in ("parameters", "time")]  # fmt: skip
    assert rows[2] == ["skips", *["**+0.1000 ± 0.0000**"] * 2, *["+0.0000 ± 0.2484"] * 2]  # 4.303 * 0.1 / sqrt(3)
    assert rows[3] == ["gate", "–", "–", "-0.3000", "-0.3000"]
    assert rows[4][0] == "all of them" and rows[4][1:3] == ["–", "–"]
    assert rows[4][3].startswith("**-0.4000 ± ")


def test_other_experiments_have_no_table():
    assert switches_section([record("params", {"full": [1.0], "plain": [1.0]})]) == ""
    assert switches_section([]) == ""
