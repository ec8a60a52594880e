"""A small sample of `python -m tests.fuzz`, and that it notices faults."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz import runner
from tests.fuzz.runner import Case, make_homes, run_case
from tests.fuzz.targets import TARGETS, Reading, Target

CASES = 8


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_or_named(name, tmp_path):
    make_homes([name], tmp_path)
    verdicts = [run_case(Case(name, number), tmp_path) for number in range(CASES)]
    assert [verdict for verdict in verdicts if not verdict.is_good] == []
    assert len(Counter(verdict.file for verdict in verdicts)) > 1 or len(TARGETS[name].patterns) == 1


class Fake(Target):
    """One byte that is read back without a check."""

    name, patterns = "fake", ("a.bin",)

    def make(self, folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"a" * 64)

    def read(self, folder: Path, draw: random.Random) -> Reading:
        content = (folder / "a.bin").read_bytes()
        if len(content) < 32:
            raise KeyError("short")
        return Reading(content.hex())


def test_silence_and_tracebacks_are_faults(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "fake", Fake())
    make_homes(["fake"], tmp_path)
    outcomes = {run_case(Case("fake", number), tmp_path).outcome for number in range(60)}
    assert outcomes >= {"silent", "traceback", "refused"} and outcomes <= {*runner.GOOD, "silent", "traceback"}
