"""benchmarks/quantised_linear.py on a tiny shape: what is wrong has no time."""

import json
import sys

import pytest
import torch

from benchmarks import quantised_linear
from fusedlm.ops.low_precision import reference
from scripts.low_precision_section import low_precision_section


def _run(tmp_path, monkeypatch, *arguments):
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["script", "--quick", "--device", "cpu", "--out", str(out), *arguments])
    quantised_linear.main()
    record = json.loads(out.read_text())
    record["environment"]["git_commit"] = "0123456789"
    (case,) = record["cases"]
    page = low_precision_section(record)
    for one in case["contenders"]:  # what has no time is left out
        assert (f"| {one['name']} | " in page) == (one["milliseconds"] is not None)
    return {one["name"]: one for one in case["contenders"]}, case["casts"]


def test_contenders_are_checked_and_timed(tmp_path, monkeypatch, capsys):
    names = ["bf16", "fp8 row", "fp8 row, weight cast before", "int8 row", "fp8 row, outliers isolated"]
    found, casts = _run(tmp_path, monkeypatch, "--only", *names)
    assert list(found) == ["bf16", "fp8 row", "int8 row", "fp8 row, weight cast before", "fp8 row, outliers isolated"]
    assert all(one["milliseconds"] > 0 and one["speedup"] > 0 for one in found.values())
    assert 0 < found["fp8 row, weight cast before"]["floor_ms"] < found["fp8 row"]["floor_ms"]
    assert found["int8 row"]["errors"][0] < found["fp8 row"]["errors"][0] / 2
    assert len(casts) == 6 and all(one["of_copy"] > 0 for one in casts)
    assert "fp8 row, weight cast before" in capsys.readouterr().out


def test_a_wrong_contender_has_no_time(tmp_path, monkeypatch):
    cast = reference.cast

    def wrong(*arguments):
        found, rms = cast(*arguments)
        return found._replace(scales=found.scales * 1.2), rms

    # The bound is from the emulation, which is what runs here.
    monkeypatch.setattr(quantised_linear, "_bounds", lambda *_: [0.05] * 3)
    monkeypatch.setattr(reference, "cast", wrong)
    found, _ = _run(tmp_path, monkeypatch, "--only", "fp8 row")
    assert found["fp8 row"]["milliseconds"] is None
    assert found["fp8 row"]["reason"].startswith("wrong: errors beyond")


def test_bad_shape():
    with pytest.raises(ValueError, match="shape '1x2' must be tokens x inputs x outputs"):
        quantised_linear.measure("1x2", [], torch.device("cpu"), 1e9, True, False)
