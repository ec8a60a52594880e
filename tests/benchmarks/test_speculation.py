"""benchmarks/speculation.py on a small run: rates, kept drafts, and texts compared with plain decoding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speculation import agreement, passages
from fusedlm.train import train
from scripts.speculation_section import speculation_section
from tests.train.runs import tiny_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: str):
    command = [sys.executable, str(REPOSITORY / "benchmarks/speculation.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculation")
    recipe = tiny_recipe(folder, "model.mtp={depth: 1}", "train.steps=2")
    train(recipe, folder / "run")
    return recipe, folder / "run"


def test_a_row_for_each_number_of_drafts(trained, tmp_path):
    recipe, folder = trained
    out = tmp_path / "speculation.json"
    options = ["--drafts", "1", "2", "--batches", "1", "2", "--prompt", "8", "--tokens", "12", "--passes", "1"]
    done = run(str(folder), *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    keys = [(row["temperature"], row["batch"], row["drafts"]) for row in record["rows"]]
    assert keys == [(t, batch, drafts) for t in (0.0, 1.0) for batch in (1, 2) for drafts in (0, 1, 2)]
    for row in record["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 11 / row["seconds"])
        assert (row["drafts"] == 0) == ("acceptance" not in row)
        if row["drafts"]:
            assert len(row["acceptance"]) == row["drafts"] and 1 <= row["tokens_per_step"] <= 1 + row["drafts"]
        if row["temperature"] == 0:
            assert row["same"] == 1.0, "float32: the texts are those of plain decoding"
    assert len(done.stdout.splitlines()) == len(record["rows"])
    record["environment"]["git_commit"] = "0123456789"
    table = [line for line in speculation_section(record).splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(record["rows"])
    assert table[1].startswith("| 1 | 0 | 0 | ") and table[1].endswith(" | 1.00× | 1.00 | – |")
    assert table[3].count("%") == 2, "of two drafts"


def test_passages_are_the_starts_of_documents(trained):
    recipe, _ = trained
    first, second = passages(recipe, 2, 8)
    assert len(first) == len(second) == 8 and first != second and first[0] == second[0], "end-of-text first"
    with pytest.raises(ValueError, match="documents of the validation text have 100000 tokens, not 1; ask for fewer"):
        passages(recipe, 1, 100000)


def test_agreement_ends_at_the_first_difference():
    assert agreement([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1.0
    assert agreement([[1, 2, 9, 4], [9, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]]) == 2 / 8


def test_a_folder_without_a_run_is_one_line(tmp_path):
    done = run(str(tmp_path))
    assert done.returncode == 2 and str(tmp_path) in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
