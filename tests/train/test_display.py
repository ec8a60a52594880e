"""The display: lines or a bar, and the table of backends."""

import io

from rich.console import Console

from fusedlm.ops.common import BackendSelection
from fusedlm.train import display as display_module
from fusedlm.train.display import Display

STEP = {"step": 3, "loss": 2.0, "tokens_per_second": 12345.0, "lr": 1e-3}


def display(**options):
    output = io.StringIO()
    return Display(Console(file=output, width=120, **options)), output


def test_lines_if_the_console_is_no_terminal():
    shown, output = display()
    shown.begin(0, 3)
    shown.step(STEP)
    shown.validation({"step": 3, "val_bpb": 2.25, "val_window": 16, "val_stride": 8, "val_bpb_ema": 2.125})
    shown.close()
    assert output.getvalue().splitlines() == [
        "step 3/3  loss 2.0000  12,345 tokens/s  lr 1.00e-03",
        "step 3/3  validation: 2.2500 bits per byte (window 16, stride 8), 2.1250 with averaged weights",
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


def test_the_table_has_the_backend_of_each_op_and_the_reason():
    shown, output = display()
    shown.header(
        {"device": "cpu [x86]"}, {"a.attention": BackendSelection("attention", "sdpa", "no CUDA device", None)}
    )
    assert "device:            cpu [x86]" in output.getvalue()
    assert all(word in output.getvalue() for word in ("a.attention", "sdpa", "no CUDA device"))


def test_no_console_shows_nothing(capsys):
    shown = Display(None)
    shown.header({"a": "b"}, {})
    shown.preparing("tokenizing", 1, None)
    shown.begin(0, 1)
    shown.step(STEP)
    shown.close()
    assert capsys.readouterr() == ("", "")
