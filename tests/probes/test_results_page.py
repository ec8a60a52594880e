"""The section of docs/results.md on context extension, from records of the probe, new and old."""

import pytest

from fusedlm.model import build_model
from fusedlm.probes import probe_extend
from fusedlm.probes.plots import extend_plot
from fusedlm.testing import every_mixer_config, randomise_
from scripts.results import extension_section

ENVIRONMENT = {
    "date": "2026-11-22T01:16:06",
    "device_name": "a CPU",
    "dtype": "float32",
    "torch": "2",
    "git_commit": "1a",
}


@pytest.fixture(scope="module")
def record(tokenizer, documents, cpu) -> dict:
    model = randomise_(build_model(every_mixer_config(), vocab_size=tokenizer.vocab_size, seed=0)).eval()
    result = probe_extend(model, documents, tokenizer, trained_length=16, factors=(2.0, 8.0), samples=8, **cpu)
    return {"run": "runs/x", "environment": ENVIRONMENT} | result


def rows(record: dict) -> list[list[str]]:
    lines = [line for line in extension_section(record).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_absolute_values_stand_beside_changes_against_the_unstretched_model(record):
    head, _, plain, *stretched = rows(record)
    assert head == ["YaRN", "at 1×", "at 4×", "1× against unstretched", "4× against unstretched"]
    first, *others = record["curves"]
    assert plain == ["unstretched", f"{first['at_1x']:.4f}", f"{first['at_4x']:.4f}", "–", "–"]
    assert [row[0] for row in stretched] == ["factor 2", "factor 8"]
    for row, curve in zip(stretched, others, strict=True):
        assert row[1:3] == [f"{curve['at_1x']:.4f}", f"{curve['at_4x']:.4f}"]
        for cell, name in ((row[3], "change_1x"), (row[4], "change_4x")):
            change, error = cell.split(" ± ")
            assert float(change) == pytest.approx(curve[name], abs=1e-4)
            assert float(error) == pytest.approx(curve[f"{name}_error"], abs=1e-4)


def test_records_before_changes_were_stored_have_them_without_errors(record):
    kept = ("yarn", "bpb", "at_1x", "at_4x", "difference", "standard_error")
    curves = [{key: curve[key] for key in kept} | {"no_worse": False} for curve in record["curves"]]
    old = {key: value for key, value in record.items() if key != "max_multiple"} | {"reach": 8, "curves": curves}
    for row, new in zip(rows(old)[3:], rows(record)[3:], strict=True):
        assert row[:3] == new[:3]
        assert row[3:] == [cell.split(" ± ")[0] for cell in new[3:]]
    assert "windows of 8 times" in extension_section(old) and "windows of 8 times" in extension_section(record)
    assert extend_plot(old) == extend_plot(record)


def test_a_record_of_short_documents_has_no_values(tokenizer, documents, cpu, record):
    missing = dict.fromkeys(("at_1x", "at_4x", "change_1x", "change_1x_error", "change_4x", "change_4x_error"))
    curves = [curve | missing for curve in record["curves"]]
    assert [row[1:] for row in rows(record | {"curves": curves})[2:]] == [["–"] * 4] * 3
