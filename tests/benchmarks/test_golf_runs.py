"""benchmarks/record_golf.py, and the section of its record."""

import json

import pytest
import yaml

from benchmarks.record_golf import summarise_golf
from scripts.golf_runs_section import golf_runs_section

RECIPE = {
    "name": "r",
    "model": {
        "dim": 8,
        "n_layers": 1,
        "pattern": "a",
        "blocks": {"a": {"mixer": {"type": "attention", "n_heads": 1}, "ffn": {"type": "swiglu"}}},
    },
    "train": {"steps": 9, "seq_len": 8, "batch_size": 1, "seed": 3, "optimizer": {"type": "adamw"}},
}
MADE = {"date": "2026-01-02T03:04", "device_name": "GPU", "fusedlm": "1", "python": "3", "torch": "2", "triton": "3"}


def _score(bpb):
    return {"bpb": bpb, "tokens": 9, "bytes": 20, "window": 8, "stride": 4}


@pytest.fixture
def make_folder(tmp_path):
    def make(name, sliding):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        (run / "environment.json").write_text(json.dumps(MADE | {"git_commit": "0123456789"}))
        step = {"loss": 3.0, "step_seconds": 4.0, "loader_wait_seconds": 1.0, "tokens_per_second": 5.0, "mfu": None}
        step |= {"peak_memory_bytes": 2**30}
        lines = [step | {"step": n, "tokens": 8 * n} for n in (1, 9)]
        lines += [{"step": n, "val_bpb": bpb, "val_nll_per_token": 2.0} for n, bpb in ((5, 1.25), (9, 1.5))]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if sliding is not None:
            golf = {"float": _score(1.4), "plain": _score(1.45), "sliding": _score(sliding), "bytes": 9000}
            golf |= {"limit": 10**4, "code_bytes": 700, "bits_per_weight": 4.0, "files_tried": [9000], "weights": "raw"}
            (run.parent / "golf.json").write_text(json.dumps(golf | {"seconds": {}, "tensors": ["left out"]}))
        return run.parent

    return make


def test_trainings_and_files(make_folder):
    rows = [summarise_golf(make_folder(name, bpb)) for name, bpb in (("a", 1.3), ("b", 1.2), ("c", None))]
    assert (rows[0]["seed"], rows[0]["steps"], rows[0]["seconds"], rows[0]["optimizer"]["type"]) == (3, 9, 8.0, "adamw")
    assert (rows[0]["best_val_bpb"], rows[0]["best_step"], rows[0]["val_bpb"]) == (1.25, 5, 1.5)
    assert "tensors" not in rows[0]["file"] and rows[2]["file"] is None
    page = golf_runs_section({"rows": rows, "note": "A note."})
    assert "| r | `adamw` | 3 | 9 | 8 | 1.2500 | 1.5000 | 1.4000 | 1.4500 | 1.2000 | 9,000 | 9,700 |" in page
    assert "| 1.5000 | – | – | – | – | – |" in page
    assert "r, 2 seeds: 1.2500 ± 0.0707 bits per byte with a stride of 4; packing loses 0.0500." in page
    assert page.endswith("\nA note.\n") and golf_runs_section(None) == ""


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="no folder of fusedlm golf, which has run/recipe.yaml"):
        summarise_golf(tmp_path)
