"""Signals that end a command: it cleans up, and the shell learns of the signal."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

_NUMBERS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """SIGTERM or SIGHUP as an exception, like KeyboardInterrupt for SIGINT: half-written folders are removed."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def raising_signals() -> Iterator[None]:
    """Inside the context, the first SIGTERM or SIGHUP raises Terminated, and a second SIGTERM kills.

    Training replaces these handlers by its own (`fusedlm.runs.signals`). An ignored signal stays ignored, as nohup
    wants it. Outside the main thread, where Python allows no handlers, nothing is changed.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in _NUMBERS:
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise(number, frame) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A closed terminal sends SIGHUP more than once.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise Terminated(number)


def exit_code(number: int) -> int:
    """128 plus the number of a signal, as shells report it."""
    return 128 + number


def die_of_interrupt() -> None:
    """End this process by SIGINT if it was started by a shell in a terminal.

    A shell stops its loop at Ctrl-C only if the command died of SIGINT (bash does not at exit code 130); either way
    the shell's $? is 130. Elsewhere it returns, and the caller exits with 130.
    """
    for stream in (sys.__stdin__, sys.__stderr__):
        try:
            in_foreground = os.tcgetpgrp(stream.fileno()) == os.getpgrp()
        except (AttributeError, OSError, ValueError):
            continue
        if in_foreground:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
