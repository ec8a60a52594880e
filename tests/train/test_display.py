"""The display: a header, lines or a bar, and the table of backends."""

import io
import os
import sys

import pytest
from rich.console import Console

from fusedlm.ops.common import BackendSelection
from fusedlm.train import display as display_module
from fusedlm.train import train
from fusedlm.train.display import Display
from tests.train.runs import SHORT, checkpoint_names, losses, tiny_recipe

STEP = {"step": 3, "loss": 2.0, "tokens_per_second": 12345.0, "lr": 1e-3}


def display(verbose: bool = False, **options):
    output = io.StringIO()
    return Display(Console(file=output, width=120, **options), verbose=verbose), output


def test_lines_if_the_console_is_no_terminal():
    shown, output = display()
    shown.begin(0, 3)
    shown.step(STEP)
    shown.validation({"step": 3, "val_bpb": 2.25, "val_window": 16, "val_stride": 8, "val_bpb_ema": 2.125})
    shown.close()
    assert output.getvalue().splitlines() == [
        "step 3/3  loss 2.0000  12,345 tokens/s  lr 1.00e-03",
        "step 3/3  validation: 2.2500 bits per byte (window 16, stride 8), 2.1250 with ema weights",
    ]


def test_loads_of_experts_are_shown_if_a_model_has_them():
    shown, output = display()
    shown.begin(0, 3)
    for dead in (0, 2):
        shown.step(STEP | {"moe_max_load": 1.234, "moe_dead": dead})
    assert output.getvalue().splitlines() == [
        "step 3/3  loss 2.0000  12,345 tokens/s  load 1.23  lr 1.00e-03",
        "step 3/3  loss 2.0000  12,345 tokens/s  load 1.23, 2 dead  lr 1.00e-03",
    ]


def test_lines_come_at_most_once_a_second_but_the_last_always(monkeypatch):
    now = iter([0.0, 0.4, 0.9, 1.1, 1.2])
    monkeypatch.setattr(display_module.time, "monotonic", lambda: next(now))
    shown, output = display()
    shown.begin(0, 5)
    for step in range(1, 6):
        shown.step({**STEP, "step": step})
    assert [line.split()[1] for line in output.getvalue().splitlines()] == ["1/5", "4/5", "5/5"]


def test_a_bar_on_a_terminal():
    shown, output = display(force_terminal=True)
    shown.preparing("tokenizing", 5, 10)
    shown.header({"parameters": "1,000"}, {})
    shown.begin(0, 3)
    shown.step({**STEP, "step": 2, "skipped": True})
    shown.step(STEP)
    shown.close()
    text = output.getvalue()
    assert "tokenizing" in text and "loss 2.0000" in text and "3/3" in text
    assert "step 2: loss or gradient norm is not finite; step skipped" in text
    shown.close()


BACKENDS = {"a.attention": BackendSelection("attention", "sdpa", "no CUDA device", None)}


@pytest.mark.parametrize("verbose", [True, False])
def test_the_table_of_backends_is_for_those_who_ask(verbose: bool):
    shown, output = display(verbose)
    shown.header({"device": "cpu [x86]", "run": "a\x1b[2J\u202e"}, BACKENDS)
    lines = output.getvalue().splitlines()
    assert lines[:2] == ["device: cpu [x86]", r"run:    a\x1b[2J\u202e"]
    table = "\n".join(lines[2:])
    assert all((word in table) is verbose for word in ("a.attention", "sdpa", "no CUDA device"))
    assert bool(table) is verbose


class BreakingPipe(io.StringIO):
    """Closed by its reader after the first write."""

    def write(self, text: str) -> int:
        if self.getvalue():
            raise BrokenPipeError
        return super().write(text)


def test_a_run_has_a_header_of_six_lines_and_outlasts_its_display(tmp_path):
    recipe = tiny_recipe(tmp_path, *SHORT)
    output = io.StringIO()
    train(recipe, tmp_path / "shown", console=Console(file=output, width=200))
    lines = output.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("run:"))
    names = [line.split(":")[0] for line in lines[start : start + 6]]
    assert names == ["run", "device", "model", "optimizer", "text", "steps"] and lines[start + 6].startswith("step ")
    assert "60 documents" in lines[start + 4] and "epochs" in lines[start + 4] and "held out" in lines[start + 4]

    before = os.fstat(sys.stdout.fileno())
    for terminal in (True, False):
        run = tmp_path / f"broken-{terminal}"
        train(recipe, run, console=Console(file=BreakingPipe(), force_terminal=terminal))
        assert losses(run) == losses(tmp_path / "shown")
        assert checkpoint_names(run) == ["step-00000003"]
    assert os.fstat(sys.stdout.fileno()).st_ino == before.st_ino  # rich would redirect it


def test_no_console_shows_nothing(capsys):
    shown = Display(None)
    shown.header({"a": "b"}, BACKENDS)
    shown.preparing("tokenizing", 1, None)
    shown.begin(0, 1)
    shown.step(STEP)
    shown.close()
    assert capsys.readouterr() == ("", "")
