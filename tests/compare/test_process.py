"""Work in a new process: results, warnings, errors, signals and memory."""

import multiprocessing
import os
import signal
import sys

import pytest
import torch
from torch._inductor import config as inductor_config

from fusedlm.compare import process as process_module
from fusedlm.compare.process import Stopped, Task, run_in_process, run_tasks
from fusedlm.runs.signals import StopSignal
from tests.compare import process_work


def run(name: str, *arguments, report=lambda kind, content: None, stop=None):
    return run_in_process(getattr(process_work, name), *arguments, report=report, stop=stop or StopSignal())


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_and_reports_come_back(tmp_path, monkeypatch, three_threads):
    monkeypatch.chdir(tmp_path)
    seen = []
    pid, group, folder, threads = run("where", report=lambda kind, content: seen.append((kind, content)))
    assert pid != os.getpid() and folder == str(tmp_path) and threads == 3
    assert group == pid, "a signal of the terminal reaches it through this process alone"
    assert seen == [("step", 1), ("step", 2)]


@pytest.mark.parametrize(("n_processes", "expected"), [(1, 6), (2, 3), (4, 1), (8, 1)])
def test_processes_share_the_threads(monkeypatch, three_threads, n_processes, expected):
    torch.set_num_threads(6)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    tasks = [Task(process_work.threads, (), lambda kind, content: None)]
    (found,) = (child.result() for child in run_tasks(tasks, [None] * n_processes, lambda: False))
    assert found == (expected, min(expected, os.cpu_count()))


def test_threads_for_compilation_that_are_set_stay(monkeypatch, three_threads):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", str(inductor_config.compile_threads))
    torch.set_num_threads(1)
    assert run("threads") == (1, inductor_config.compile_threads)


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


def test_work_that_does_not_handle_the_signal_is_stopped(tmp_path):
    with StopSignal() as stop, pytest.raises(Stopped):
        run("wait", tmp_path / "end", report=lambda kind, content: os.kill(os.getpid(), signal.SIGTERM), stop=stop)
    assert not (tmp_path / "end").exists()


def test_work_ends_with_an_error_of_this_process(tmp_path):
    def fail(kind, content):
        raise KeyError(kind)

    with pytest.raises(KeyError, match="begin"):
        run("wait", tmp_path / "end", report=fail)
    assert not (tmp_path / "end").exists()


def start(context, folder, work: str, *arguments):
    """(process, our end of its pipe) of work that sends messages."""
    ours, theirs = context.Pipe(duplex=False)
    settings = (str(folder), 1, None, None)
    function = getattr(process_work, work)
    child = context.Process(target=process_module._run, args=(theirs, settings, function, arguments))
    child.start()
    theirs.close()
    return child, ours


def test_work_can_be_stopped_where_interrupts_are_ignored(tmp_path):
    """As they are in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child, ours = start(multiprocessing.get_context("fork"), tmp_path, "clean_up")
        assert ours.recv() == ("begin", 0)
        os.kill(child.pid, signal.SIGINT)
        assert ours.recv() == ("result", "cleaned up")
        child.join()
        child, ours = start(multiprocessing.get_context("fork"), tmp_path, "wait", tmp_path / "end")
        assert ours.recv() == ("begin", 0)
        os.kill(child.pid, signal.SIGINT)
        assert ours.recv() == ("stopped", None)
        child.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_work_saves_and_stops_when_the_parent_is_gone(tmp_path):
    child, ours = start(process_module._context(), tmp_path, "report_until_stopped", tmp_path / "stopped")
    assert ours.recv() == ("step", 1)
    ours.close()
    child.join()
    assert (tmp_path / "stopped").read_text() == "SIGINT" and child.exitcode == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is counted differently")
def test_memory_is_that_of_the_work_alone():
    block = bytearray(400 * 2**20)
    assert run("peak_memory") < len(block) + 200 * 2**20
    first = run("peak_memory", 300)
    assert first - run("peak_memory") > 250 * 2**20  # memory of one process is not counted in the next
    del block
