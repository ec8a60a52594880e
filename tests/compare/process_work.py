"""Functions that test_process runs in new processes."""

import logging
import os
import signal

import torch

from fusedlm.runs.hardware import peak_memory_bytes
from fusedlm.runs.signals import StopSignal


def where(send):
    send("step", 1)
    send("step", 2)
    return os.getpid(), os.getcwd()


def warn(send):
    logging.getLogger("fusedlm.somewhere").warning("backend %s cannot run", "x")


def refuse(send):
    raise ValueError("no such thing")


def fail(send):
    return 1 / 0


def die(send):
    os.kill(os.getpid(), signal.SIGKILL)


def clean_up(send):
    with StopSignal() as stop:
        send("begin", 0)
        while stop.received is None:
            pass
    return "cleaned up"


def report_until_stopped(path, send):
    """Writes the signal that stopped it to a file."""
    with StopSignal() as stop:
        while stop.received is None:
            send("step", 1)
    path.write_text(stop.received.name)


def wait(send):
    send("begin", 0)
    signal.pause()


def peak_memory(*arguments):
    *megabytes, _ = arguments
    block = bytearray(sum(megabytes) * 2**20)
    del block
    return peak_memory_bytes(torch.device("cpu"))
