"""Run a function in a new process: every run starts with the same memory, caches and random state."""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from fusedlm.runs.signals import StopSignal

Report = Callable[[str, object], None]  # called in this process with (kind, content) from the work

_POLL_SECONDS = 0.2


class Stopped(Exception):
    """The work was stopped by a signal before it had a result."""


def run_in_process(work: Callable, *arguments, report: Report, stop: StopSignal):
    """Call work(*arguments, send) in a new process; `send(kind, content)` there calls `report` here.

    The process is forked from a server that has imported torch and used no GPU: its peak memory is that of the work
    alone. Warnings that the work logs are reported as ("warning", text). A signal that `stop` receives is passed on
    once, as SIGINT.

    Args:
        work: an importable function whose arguments and result can be pickled.

    Returns:
        The result of `work`.

    Raises:
        ValueError, OSError: from the work, with its message; ValueError also if the process was killed.
        Stopped: the work was stopped by the signal.
        RuntimeError: any other exception of the work, with its traceback.
    """
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    settings = (os.getcwd(), torch.get_num_threads())
    # Not a daemon: daemons cannot start processes, and compilation may.
    process = context.Process(target=_run, args=(theirs, settings, work, arguments))
    process.start()
    theirs.close()
    try:
        outcome = _listen(ours, process, report, stop)
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        ours.close()
    match outcome:
        case ("result", result):
            return result
        case ("refused", message):
            raise ValueError(message)
        case ("failed", text):
            raise RuntimeError(f"the process of the run failed:\n{text}")
    if stop.received is not None:
        raise Stopped
    reason = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
    raise ValueError(f"its process ended by {reason}; signal 9 can mean that the machine is out of memory")


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusedlm.compare.work"])
    return context


def _listen(connection: Connection, process, report: Report, stop: StopSignal):
    """The last message, or None if the process ended without one."""
    signalled = False
    while True:
        if stop.received is not None and not signalled:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            signalled = True
        if not connection.poll(_POLL_SECONDS):
            continue
        try:
            kind, content = connection.recv()
        except EOFError:
            return None
        if kind in ("result", "refused", "failed", "stopped"):
            return kind, content
        report(kind, content)


class _SendWarnings(logging.Handler):
    def __init__(self, send: Report):
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("warning", record.getMessage())


def _run(connection: Connection, settings, work: Callable, arguments) -> None:
    # Leave the terminal's process group: the parent receives its signals and passes each on once.
    os.setpgid(0, 0)
    # Ignored here, if the parent was started in the background of a script; then nothing could stop the work.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, threads = settings
    os.chdir(folder)
    torch.set_num_threads(threads)

    def send(kind: str, content) -> None:
        try:
            connection.send((kind, content))
        except OSError:  # the parent was killed: stop as by a signal, which saves
            signal.raise_signal(signal.SIGINT)

    logging.basicConfig(level=logging.WARNING, handlers=[_SendWarnings(send)], force=True)
    try:
        message = ("result", work(*arguments, send))
    except KeyboardInterrupt:
        message = ("stopped", None)
    except (ValueError, OSError) as error:
        message = ("refused", str(error))
    except Exception:
        message = ("failed", traceback.format_exc())
    with contextlib.suppress(OSError):
        connection.send(message)
