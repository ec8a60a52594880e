"""Functions that test_process runs in new processes."""

import logging
import os
import signal
import time

import torch
from torch._inductor import config as inductor_config

from fusedlm.compare.process import _POLL_SECONDS
from fusedlm.runs.hardware import peak_memory_bytes
from fusedlm.runs.signals import StopSignal

_LONGEST = 60  # seconds that work waits for what a test does


def where(send):
    send("step", 1)
    send("step", 2)
    return os.getpid(), os.getpgrp(), os.getcwd(), torch.get_num_threads()


def threads(send):
    return torch.get_num_threads(), inductor_config.compile_threads


def warn(send):
    logging.getLogger("fusedlm.somewhere").warning("backend %s cannot run", "x")


def refuse(send):
    raise ValueError("no such thing")


def fail(send):
    return 1 / 0


def die(send):
    os.kill(os.getpid(), signal.SIGKILL)


def clean_up(send):
    """Handles a signal, and returns what comes before its parent would look for signals again."""
    end = time.monotonic() + _LONGEST
    with StopSignal() as stop:
        send("begin", 0)
        while stop.received is None and time.monotonic() < end:
            pass
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        again = signal.sigtimedwait([signal.SIGINT], 3 * _POLL_SECONDS)
    if stop.received is None:
        return "not signalled"
    return "cleaned up" if again is None else "signalled twice"


def report_until_stopped(path, send):
    """Writes the signal that stopped it to a file."""
    end = time.monotonic() + _LONGEST
    with StopSignal() as stop:
        while stop.received is None and time.monotonic() < end:
            send("step", 1)
    path.write_text(str(stop.received and stop.received.name))


def wait(path, send):
    """Writes a file if it is not stopped."""
    send("begin", 0)
    signal.sigtimedwait([signal.SIGUSR1], _LONGEST)
    path.write_text("not stopped")


def peak_memory(*arguments):
    *megabytes, _ = arguments
    block = bytearray(sum(megabytes) * 2**20)
    del block
    return peak_memory_bytes(torch.device("cpu"))
