"""What a report says about files of a run that are not as they were written."""

import json
import shutil

import pytest

from fusedlm.report import write_report
from fusedlm.runs.integrity import check_run
from tests.runs.edits import as_written_before_checksums, edit_state


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained[1], tmp_path / "run")


def test_an_intact_run_has_no_problems(trained, copied):
    assert check_run(trained[1]) == []
    assert check_run(as_written_before_checksums(copied)) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("recipe.yaml", "seed: 0", "seed: 1", "recipe.yaml was changed after it was written."),
        ("environment.json", '"cpu"', '"gpu"', "environment.json was changed after it was written."),
        ("tokenizer.meta.json", "bytes", "byte", "tokenizer.meta.json was changed after it was written."),
        ("recipe.yaml", None, None, "recipe.yaml is missing."),
        ("run.json", '"run"', '"ran"', "run.json was changed after it was written."),
        ("run.json", None, None, "run.json is missing."),
        ("metrics.jsonl", '"step": 3', '"step": 4', "metrics.jsonl is not as it was written: step 3 is missing"),
        ("metrics.jsonl", None, None, "metrics.jsonl is not as it was written: steps 1 to 12 are missing."),
        ("checkpoints/step-00000012/state.json", '"step": 12', '"step": 11', "Damaged checkpoint: "),
    ],
)
def test_a_changed_or_missing_file_is_named(copied, name, old, new, problem):
    path = copied / name
    if old is None:
        path.unlink()
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
    (found,) = check_run(copied)
    assert found.startswith(problem)


def test_a_checkpoint_of_another_run_is_named(copied):
    edit_state(copied, 12, run="e" * 32)
    (found,) = check_run(copied)
    assert found.startswith("Foreign checkpoint: ") and "step-00000012 is of another run" in found


def test_records_that_do_not_lead_to_the_checkpoint(copied):
    """Lines that fit each other, of another run."""
    edit_state(copied, 12, metrics="0" * 16)
    assert check_run(copied) == [
        "metrics.jsonl is not as it was written: the records up to step 12 are not those of its checkpoint."
    ]


def test_a_checkpoint_of_another_version_does_not_prevent_a_report(copied):
    edit_state(copied, 12, moons=2)
    (found,) = check_run(copied)
    assert "field 'moons' is unknown to this version" in found


def test_the_report_says_it(copied):
    path = copied / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] not in (5, 6)]
    path.write_text("".join(lines))
    page = write_report(copied).read_text()
    assert "metrics.jsonl is not as it was written: steps 5 to 6 are missing." in page
