"""benchmarks/many_gpus.py on two processes of the CPU, and the table of docs/results.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.many_gpus_section import compared, many_gpus_section

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = "{dim: 16, n_layers: 2, pattern: a, blocks: {a: {mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu}}}}"
OPTIONS = ["train.seq_len=8", "train.batch_size=2", "train.micro_batch_size=1", "runtime.compile=false"]


def test_rows_of_one_and_two_processes(tmp_path):
    out = tmp_path / "many.json"
    command = [sys.executable, "benchmarks/many_gpus.py", str(REPOSITORY / "recipes/gpt-350m.yaml"), f"model={SMALL}"]
    command += [*OPTIONS, "runtime.device=cpu", "--vocab-size", "64", "--processes", "1", "2", "--steps", "1"]
    command += ["--loss-steps", "3", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["name"] == "gpt-350m" and "--json" not in record["command"]
    assert [(row["processes"], row["parallel"]["shard"]) for row in record["rows"]] == [(1, 1), (2, 2)]
    one, two = compared(record["rows"])
    assert one["scaling"] == 1 and one["loss_difference"] == 0
    assert two["loss_difference"] < 1e-5, "float32"
    assert len(done.stdout.splitlines()) == 3
    record["environment"]["git_commit"] = "0123456789"
    record["rows"].append(record["rows"][1] | {"parallel": record["rows"][1]["parallel"] | {"zero": 2}})
    rows = [line for line in many_gpus_section([record]).splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| 1 | – | ") and rows[2].startswith("| 2 | shard 2 | ")
    assert rows[3].startswith("| 2 | shard 2, zero 2 | ")


def test_comparison_with_the_first_row():
    first = {"tokens_per_second_per_gpu": 100.0, "step_seconds": 1.0, "optimizer_seconds": 0.1, "losses": [2.0, 1.0]}
    other = {"tokens_per_second_per_gpu": 90.0, "step_seconds": 1.1, "optimizer_seconds": 0.2, "losses": [2.0, 1.5]}
    row = compared([first, other])[1]
    assert row["scaling"] == pytest.approx(0.9) and row["optimizer"] == pytest.approx(0.2 / 1.1)
    assert row["replicated"] == pytest.approx(0.1) and row["loss_difference"] == 0.5
