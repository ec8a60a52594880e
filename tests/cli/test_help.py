"""fusedlm help: sections and keys of recipes, in the width of the terminal."""

import subprocess
import sys

import pytest

from fusedlm.config.reference import places


@pytest.fixture(params=[40, 100])
def columns(request, monkeypatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def test_without_a_key_the_sections_are_listed(fusedlm, columns: int):
    outcome = fusedlm("help")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) < columns
    assert {line.strip() for line in lines} >= {place.key for place in places() if place.key}


def test_a_section_is_shown_with_every_key(fusedlm, columns: int):
    for place in places()[1:]:
        outcome = fusedlm("help", place.key)
        assert (outcome.code, outcome.err) == (0, "")
        lines = outcome.out.splitlines()
        assert max(map(len, lines)) < columns
        for section in place.sections:
            assert {f"  {key.name}" for key in section.keys} <= set(lines)


def test_a_key_is_shown_with_type_default_and_meaning(fusedlm):
    out = fusedlm("help", "train.optimizer.lr").out
    assert "train.optimizer.lr (type sgd)\n  number, greater than 0, at most 1e38; default 0.1\n  Learning" in out
    assert "required" in fusedlm("help", "train.steps").out
    assert "name of the variant" in fusedlm("help", "experiment.variants").out


def test_a_section_that_is_also_a_command_names_it(fusedlm):
    assert fusedlm("help", "train").out.endswith("Of the command: fusedlm train --help\n")
    assert "--help" not in fusedlm("help", "model").out


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("train.lr", "train.lr: no such key; did you mean train.optimizer.lr?"),
        ("eval", "for the command: fusedlm eval --help"),
        ("\x1b[31m", "\\x1b[31m: no such key"),
    ],
)
def test_unknown_keys_are_one_line(fusedlm, key: str, named: str):
    outcome = fusedlm("help", key)
    assert (outcome.code, outcome.out) == (2, "")
    assert named in outcome.err and outcome.err.count("\n") == 1 and outcome.err.strip().isprintable()


def test_torch_is_not_loaded():
    code = "import sys; from fusedlm.cli import main; main(['help', 'train']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
