"""benchmarks/decoding.py on small models, and the section of docs/results.md that its record becomes."""

import json

import pytest
import torch

from benchmarks import decoding
from fusedlm.testing import MIXER_CASES, part_model
from scripts.decoding_section import PLOT, decoding_section, draw_decoding

CPU = torch.device("cpu")


@pytest.fixture
def record(tmp_path, monkeypatch):
    out = tmp_path / "decoding.json"
    arguments = ["--tiny", "--mixers", "attention", "gdn", "--batches", "1", "2", "--contexts", "9", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["decoding.py", *arguments])
    monkeypatch.setattr(decoding, "VARIED", decoding.VARIED[:1])
    monkeypatch.setattr(decoding, "_MILLISECONDS", 0)
    monkeypatch.setattr(decoding, "environment", lambda *_: {
        "date": "2026-01-02T03:04:05+00:00", "device_name": "a CPU", "dtype": "float32", "python": "3.12",
        "torch": "2.11", "triton": "3.6", "git_commit": "0123456789",
    })  # fmt: skip
    decoding.main()
    monkeypatch.setattr("sys.argv", ["decoding.py", *arguments, "--parts", "alone", "--add"])
    decoding.main()
    return json.loads(out.read_text())


def test_the_record_becomes_a_section_and_a_plot(record, tmp_path):
    assert [(row["mixer"], row["batch"]) for row in record["table"]] == [
        ("attention", 1), ("attention", 2), ("gdn", 1), ("gdn", 2),
    ]  # fmt: skip
    assert all(row["tokens_per_second"] > 0 and not row["graph"] for row in record["table"])
    assert [row["recipe"] for row in record["alone"]] == ["gpt-350m", "hybrid-350m"]
    assert [row["variant"] for row in record["variants"]] == list(decoding.VARIANTS)
    record["table"][1] = {"mixer": "attention", "batch": 2, "context": 9, "reason": "out of memory"}
    page = decoding_section(record)
    assert f"    {record['command']}\n" in page and record["command"].count("--tiny") == 2
    assert "| mixer | 9 tokens, batch 1 | 9 tokens, batch 2 |" in page
    assert "attention, 9 tokens, batch 2: out of memory" in page and "no graph" in page
    draw_decoding(record, tmp_path)
    assert (tmp_path / PLOT).stat().st_size > 10_000
    assert decoding_section(None) == ""


@pytest.mark.parametrize("mixer", MIXER_CASES)
def test_a_filled_state_has_the_bytes_of_the_account(mixer):
    model = part_model(MIXER_CASES[mixer][0], vocab_size=61).eval()
    state = decoding.filled_state(model, 3, 20, CPU, torch.float32)
    state.make_static(20 + decoding._SPARE)
    assert state.lengths == [20] * 3
    counted = decoding.moved_state_bytes(state, 20)
    held = decoding.model_state_bytes(model, 3, 20, torch.float32)
    assert counted == (2 * held if mixer in ("gdn", "sdla", "mamba2") else held)


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_count_each_matrix_once(tied):
    model = part_model(MIXER_CASES["mla"][0], vocab_size=64, extra=f"tie_embeddings: {str(tied).lower()}")
    small = sum(p.numel() for name, p in model.named_parameters() if p.dim() < 2)
    matrices = sum(p.numel() for p in model.parameters()) - small
    if not tied:
        matrices -= model.embedding.weight.numel()
    assert decoding.weight_bytes(model, torch.bfloat16) == 2 * matrices + 4 * small
