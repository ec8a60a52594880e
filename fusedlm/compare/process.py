"""A function in a process of its own, so that every run starts from the same clean memory, caches and random state."""

import contextlib
import functools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from fusedlm.train.signals import StopSignal

Report = Callable[[str, object], None]  # (kind, content) from the work to whoever waits for it

_POLL_SECONDS = 0.2


class Stopped(Exception):
    """The work was told to stop before it had a result."""


def apart(work: Callable, *arguments, report: Report, stop: StopSignal):
    """work(*arguments, send), with `send` passing on to `report` here.

    The process is forked from a server that has torch loaded and has touched no GPU: peak memory is that of the work
    alone. A signal that `stop` receives is passed on once, as SIGINT.

    Args:
        work: a function that can be imported; what it takes and gives can be pickled.

    Returns:
        What `work` returns.

    Raises:
        ValueError, OSError: of the work, with its message; also when the process was killed.
        Stopped: the work ended by the signal, without a result.
        RuntimeError: any other exception of the work, with its traceback.
    """
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    settings = (os.getcwd(), torch.get_num_threads())
    # Not a daemon: those may have no processes of their own, which compiling can want.
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
    raise ValueError(f"its process ended by {reason}; when that is 9, the machine's memory may not hold the run")


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusedlm.compare.work"])
    return context


def _listen(connection: Connection, process, report: Report, stop: StopSignal):
    """The last message, or None when the process ended without one."""
    told = False
    while True:
        if stop.received is not None and not told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            told = True
        if not connection.poll(_POLL_SECONDS):
            continue
        try:
            kind, content = connection.recv()
        except EOFError:
            return None
        if kind in ("result", "refused", "failed", "stopped"):
            return kind, content
        report(kind, content)


def _run(connection: Connection, settings, work: Callable, arguments) -> None:
    # Out of the terminal's group: its signals go to the parent, which passes each on once.
    os.setpgid(0, 0)
    folder, threads = settings
    os.chdir(folder)
    torch.set_num_threads(threads)

    def send(kind: str, content) -> None:
        connection.send((kind, content))

    try:
        message = ("result", work(*arguments, send))
    except KeyboardInterrupt:
        message = ("stopped", None)
    except (ValueError, OSError) as error:
        message = ("refused", str(error))
    except Exception:
        message = ("failed", traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        connection.send(message)
