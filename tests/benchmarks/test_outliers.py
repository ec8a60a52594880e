"""Planted outliers change no output of a model, and cost what isolating them saves."""

import pytest
import torch

from benchmarks import outliers
from fusedlm.testing import part_model, randomise_
from scripts.low_precision_section import outliers_section


@pytest.fixture(scope="module")
def rows():
    model = randomise_(part_model("{type: attention, n_heads: 2}")).train()
    tokens = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]
    return [row for planted in (0, 2) for row in outliers.measure(model, batch, planted, 100.0)]


def test_planting_changes_no_output(rows):
    assert len({row["planted"] for row in rows}) == 2
    assert rows[-1]["exact_loss"] == pytest.approx(rows[0]["exact_loss"], rel=1e-5)


def test_isolating_saves_what_outliers_cost(rows):
    error = {(row["planted"], row["format"], row["isolated"]): row["gradient_error"] for row in rows}
    assert 0 < error[0, "int8", False] < 0.2 < error[2, "int8", False]
    assert error[2, "int8", True] < 2 * error[0, "int8", False]
    assert all(row["share"] > 0 for row in rows if row["planted"] and row["isolated"])


def test_the_page_has_both_of_each_format(rows):
    made = {"date": "2026-01-01T00:00", "torch": "2", "git_commit": "0" * 40}
    record = {"command": "python x", "environment": made, "tokens": 64, "factor": 7.0, "threshold": 3.5, "rows": rows}
    page = outliers_section(record, None)
    assert "times 7, " in page
    assert page.count("| int8 |") == 2 and page.count("%") == 4 * len(rows) // 2
    isolated = {"name": "fp8 row, outliers isolated", "milliseconds": 2.5, "speedup": 0.8}
    cost = {"command": "python y", "environment": made | {"device_name": "GPU", "triton": "3"}}
    cost["ceilings"] = {"bytes_per_second": 1e12, "flops_per_second": 1e14}
    cost["cases"] = [{"shape": "4x2x3", "contenders": [isolated]}]
    beside = outliers_section(record, cost)
    assert beside.startswith(page) and "| fp8 row, outliers isolated | 2.500 (0.80×) |" in beside
