"""Work in a new process: results, warnings, errors, signals and memory."""

import os
import signal
import sys

import pytest

from fusedlm.compare.process import Stopped, run_in_process
from fusedlm.runs.signals import StopSignal
from tests.compare import process_work


def run(name: str, *arguments, report=lambda kind, content: None, stop=None):
    return run_in_process(getattr(process_work, name), *arguments, report=report, stop=stop or StopSignal())


def test_results_and_reports_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    pid, folder = run("where", report=lambda kind, content: seen.append((kind, content)))
    assert pid != os.getpid() and folder == str(tmp_path)
    assert seen == [("step", 1), ("step", 2)]


def test_warnings_are_reported_here(capfd):
    seen = []
    assert run("warn", report=lambda kind, content: seen.append((kind, content))) is None
    assert seen == [("warning", "backend x cannot run")]
    assert capfd.readouterr().err == ""


def test_errors_of_the_user_keep_their_message_and_others_their_traceback():
    with pytest.raises(ValueError, match="^no such thing$"):
        run("refuse")
    with pytest.raises(RuntimeError, match=r"in fail(.|\n)*ZeroDivisionError"):
        run("fail")


def test_a_killed_process_is_one_line():
    with pytest.raises(ValueError, match="ended by signal 9; signal 9 can mean that the machine is out of memory"):
        run("die")


def test_a_signal_is_passed_on_once_and_the_work_may_finish():
    """The work handles SIGINT and still returns a result."""
    with StopSignal() as stop:
        result = run("clean_up", report=lambda kind, content: os.kill(os.getpid(), signal.SIGINT), stop=stop)
    assert result == "cleaned up" and stop.received is signal.SIGINT


def test_work_that_does_not_handle_the_signal_is_stopped():
    with StopSignal() as stop, pytest.raises(Stopped):
        run("wait", report=lambda kind, content: os.kill(os.getpid(), signal.SIGTERM), stop=stop)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is counted differently")
def test_memory_is_that_of_the_work_alone():
    block = bytearray(400 * 2**20)
    assert run("peak_memory") < len(block) + 200 * 2**20
    first = run("peak_memory", 300)
    assert first - run("peak_memory") > 250 * 2**20  # memory of one process is not counted in the next
    del block
