"""Run functions in new processes: every run starts with the same memory, caches and random state."""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch._inductor import config as inductor_config

from fusedlm.compare.gpus import VISIBLE_GPUS
from fusedlm.runs.signals import StopSignal

Report = Callable[[str, object], None]  # called in this process with (kind, content) from the work

_POLL_SECONDS = 0.2
_COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"  # torch's own setting


class Stopped(Exception):
    """The work was stopped by a signal before it had a result."""


@dataclass(frozen=True)
class Task:
    """A function to call in a new process, as work(*arguments, send); `send(kind, content)` there calls `report` here.

    work: an importable function whose arguments and result can be pickled.
    about: what the task is, for the caller.
    """

    work: Callable
    arguments: tuple
    report: Report
    about: Any = None


def run_in_process(work: Callable, *arguments, report: Report, stop: StopSignal, gpu: str | None = None):
    """Run one task, as `run_tasks` does, and return its result.

    Raises:
        As `Child.result`.
    """
    task = Task(work, arguments, report)
    with contextlib.closing(run_tasks([task], [gpu], lambda: stop.received is not None)) as ended:
        for child in ended:
            return child.result()
    raise Stopped


def run_tasks(tasks: Iterable[Task], gpus: Sequence[str | None], must_stop: Callable[[], bool]) -> Iterator["Child"]:
    """Run tasks in order, each in a process of its own, as many at once as there are `gpus`. Gives each as it ends.

    A task is taken from `tasks` when a GPU is free for it. Once `must_stop` is true no other is taken, and those that
    run receive SIGINT once; they are given too. Closing the generator kills them instead. All of it happens in the
    calling thread. The processes share the threads of this one, and those that compile: with as many for each as there
    are cores, they would mostly wait for each other.

    Args:
        gpus: values of CUDA_VISIBLE_DEVICES, one for each process that may run; None: the process sees what this one
            sees.
    """
    left, free, running, n_threads = iter(tasks), list(gpus), [], _share(torch.get_num_threads(), len(gpus))
    try:
        while True:
            while free and not must_stop() and (task := next(left, None)) is not None:
                running.append(Child(task, free.pop(0), must_stop, n_threads))
            if not running:
                return
            if must_stop():
                for child in running:
                    child.interrupt()
            ready = wait([child.connection for child in running], _POLL_SECONDS)
            for child in [child for child in running if child.connection in ready]:
                if not child.receive():
                    running.remove(child)
                    free.append(child.gpu)
                    yield child
    finally:
        for child in running:
            child.kill()
        for child in running:
            child.join()


class Child:
    """The process of a task.

    It is forked from a server that has imported torch and used no GPU: its peak memory is that of the work alone.
    Warnings that the work logs are reported as ("warning", text).
    """

    def __init__(self, task: Task, gpu: str | None, must_stop: Callable[[], bool], n_threads: int):
        self.task, self.gpu = task, gpu
        self._must_stop = must_stop
        self._interrupted = False
        self._outcome: tuple[str, Any] | None = None
        context = _context()
        self.connection, theirs = context.Pipe(duplex=False)
        # Number of threads that compile; None: as many as the user has set.
        n_compiling = None if _COMPILE_THREADS in os.environ else n_threads
        settings = (os.getcwd(), n_threads, n_compiling, gpu)
        # Not a daemon: daemons cannot start processes, and compilation may.
        self._process = context.Process(target=_run, args=(theirs, settings, task.work, task.arguments))
        self._process.start()
        theirs.close()

    def receive(self) -> bool:
        """Receive one message, and report it unless it is the last. False: it was, and the process has ended."""
        try:
            kind, content = self.connection.recv()
        except EOFError:  # the process ended without a last message
            self.join()
            return False
        if kind in ("result", "refused", "failed", "stopped"):
            self._outcome = kind, content
            self.join()
            return False
        self.task.report(kind, content)
        return True

    def interrupt(self) -> None:
        """Send SIGINT, once."""
        if not self._interrupted:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGINT)
            self._interrupted = True

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> None:
        self._process.join()
        self.connection.close()

    def result(self):
        """The result of the work, once it has ended.

        Raises:
            ValueError: from the work (also OSError there), with its message, or the process was killed.
            Stopped: the work was stopped by the signal.
            RuntimeError: any other exception of the work, with its traceback.
        """
        match self._outcome:
            case ("result", result):
                return result
            case ("refused", message):
                raise ValueError(message)
            case ("failed", text):
                raise RuntimeError(f"the process of the run failed:\n{text}")
        if self._must_stop():
            raise Stopped
        code = self._process.exitcode
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ValueError(f"its process ended by {reason}; signal 9 can mean that the machine is out of memory")


def _share(n_threads: int, n_processes: int) -> int:
    return max(1, n_threads // max(1, n_processes))


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusedlm.compare.work"])
    return context


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
    folder, threads, compiling, gpu = settings
    if gpu is not None:  # CUDA reads it when it is initialised, which importing fusedlm does not do
        os.environ[VISIBLE_GPUS] = gpu
    os.chdir(folder)
    torch.set_num_threads(threads)
    if compiling is not None:
        inductor_config.compile_threads = min(inductor_config.compile_threads, compiling)

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
