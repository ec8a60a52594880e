"""Progress of a grid, on a terminal and elsewhere."""

import io

from rich.console import Console

from fusedlm.compare.progress import GridDisplay

SPANS = {"val_window": 16, "val_stride": 8}


def play(terminal: bool) -> str:
    out = io.StringIO()
    display = GridDisplay(Console(file=out, force_terminal=terminal, width=100))
    display.open([10, 10, 20], done=10, n_done=1)
    display.begin("new-seed0", 10)
    display.report("new-seed0", "begin", 5)
    display.report("new-seed0", "step", {"step": 6, "loss": 3.25, "tokens_per_second": 1234.5})
    display.report("new-seed0", "step", {"step": 7, "loss": float("nan"), "skipped": True})
    display.report("new-seed0", "validation", {"step": 10, "val_nll_per_token": 2.5, "val_bpb": 1.75} | SPANS)
    display.report("new-seed0", "note", "a [warning]")
    display.end("new-seed0", "validation 2.5000 nats per token")
    display.begin("old-seed1", 20)
    display.close()
    return out.getvalue()


def test_plain_lines_off_a_terminal():
    assert play(terminal=False).splitlines() == [
        "[2/3] new-seed0: 10 steps",
        "new-seed0: resuming from step 5",
        "[2/3] new-seed0: step 6 of 10  loss 3.2500  1,234 tokens/s",
        "[2/3] new-seed0: step 10 of 10, validation 2.5000 nats per token, 1.7500 bits per byte (window 16, stride 8)",
        "new-seed0: a [warning]",
        "[2/3] new-seed0: validation 2.5000 nats per token",
        "[3/3] old-seed1: 20 steps",
    ]


def test_bars_on_a_terminal():
    shown = play(terminal=True)
    assert "\x1b[" in shown and "2 of 3 runs" in shown and "a [warning]" in shown and "old-seed1" in shown


def play_two(terminal: bool) -> str:
    out = io.StringIO()
    display = GridDisplay(Console(file=out, force_terminal=terminal, width=100))
    display.open([10, 10, 20], done=10, n_done=1)
    display.begin("new-seed0", 10)
    display.begin("old-seed1", 20)
    display.report("new-seed0", "step", {"step": 4, "loss": 3.25, "tokens_per_second": 1234.5})
    display.report("old-seed1", "step", {"step": 12, "loss": 2.25, "tokens_per_second": 10.0})
    display.report("elsewhere", "step", {"step": 1, "loss": 1.25, "tokens_per_second": 10.0})  # work that is no run
    display.end("old-seed1", "done")
    display.report("new-seed0", "note", "still here")
    display.close()
    return out.getvalue()


def test_lines_of_runs_at_once():
    assert play_two(terminal=False).splitlines() == [
        "[2/3] new-seed0: 10 steps",
        "[2/3] old-seed1: 20 steps",
        "[2/3] new-seed0: step 4 of 10  loss 3.2500  1,234 tokens/s",
        "[2/3] old-seed1: step 12 of 20  loss 2.2500  10 tokens/s",
        "[2/3] old-seed1: done",
        "new-seed0: still here",
    ]


def test_bars_of_runs_at_once():
    """The last frame: the grid, at the steps of what is finished and what runs, and the run that is left."""
    shown = play_two(terminal=True)
    frame = shown[shown.rindex("2 of 3 runs") :]
    assert " 85%" in frame  # 10 + 20 + 4 of 40 steps
    assert "new-seed0" in frame and " 40%" in frame and "old-seed1" not in frame


def test_lines_about_steps_are_limited(monkeypatch):
    out = io.StringIO()
    now = iter(range(0, 1000))
    monkeypatch.setattr("fusedlm.compare.progress.time.monotonic", lambda: next(now))
    display = GridDisplay(Console(file=out, width=100))
    display.open([100], done=0, n_done=0)
    display.begin("a", 100)
    for step in range(1, 21):
        display.report("a", "step", {"step": step, "loss": 1.0, "tokens_per_second": 1.0})
    assert out.getvalue().count("loss") == 4


def test_the_same_warning_of_several_runs_is_logged_once(caplog):
    display = GridDisplay(None)
    for text in ("attention cannot run", "attention cannot run", "another"):
        display.report("a", "warning", text)
    assert [record.getMessage() for record in caplog.records] == ["attention cannot run", "another"]


def test_nothing_without_a_console(capsys):
    display = GridDisplay(None)
    display.open([1], 0, 0)
    display.begin("a", 1)
    display.end("a", "done")
    display.close()
    assert capsys.readouterr().out == ""
