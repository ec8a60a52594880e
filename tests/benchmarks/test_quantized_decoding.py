"""benchmarks/quantized_decoding.py on a small run and on the same run in few bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusedlm.cli import main
from fusedlm.train import train
from tests.train.runs import tiny_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    train(tiny_recipe(folder, "train.steps=2"), folder / "run")
    assert not main(["quantize", str(folder / "run"), "--format", "int4", "--no-score", "--out", str(folder / "int4")])
    return folder / "run", folder / "int4"


def run(*arguments):
    command = [sys.executable, str(REPOSITORY / "benchmarks/quantized_decoding.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)


def test_rows_of_a_run_and_of_its_few_bits(runs, tmp_path):
    out = tmp_path / "found.json"
    sizes = ["--batches", 1, 2, "--prompt", 8, "--tokens", 6, "--passes", 1, "--eval-tokens", 64]
    done = run(*runs, *sizes, "--out", out)
    assert done.returncode == 0, done.stderr
    plain, few = json.loads(out.read_text())["rows"]
    assert (plain["run"], plain["format"]) == ("run", None) and (few["run"], few["format"]) == ("int4", "int4")
    assert few["weight_bytes"] < plain["weight_bytes"]
    assert 0 < abs(few["bits_per_byte"] - plain["bits_per_byte"]) < 0.1 * plain["bits_per_byte"]
    for row in (plain, few):
        for batch, found in row["decoding"].items():
            assert found["tokens_per_second"] == pytest.approx(int(batch) * 5 / found["seconds"])
    assert done.stdout.splitlines()[1].startswith("int4: ") and "2 rows: " in done.stdout


def test_what_is_no_run_is_refused(runs, tmp_path):
    done = run(runs[0], tmp_path)
    assert done.returncode == 2 and "holds no run" in done.stderr and "Traceback" not in done.stderr
