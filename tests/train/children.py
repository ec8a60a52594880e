"""Training in a child process that reports its progress, so that a test can stop it at a given point."""

import multiprocessing
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

# One process imports torch; each child is forked from it before any thread of torch's runs.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fusedlm.train"])


@contextmanager
def training_child(recipe, run: Path, hold_in_save_at: int | None = None):
    """A process that trains with resume, and a connection from it.

    It sends ("step", n) after the record of each step and ("result", TrainResult) at the end. With `hold_in_save_at` it
    sends ("saving", n) while it writes the checkpoint of that step, and waits there until it is killed; after a first
    signal it sends ("handlers restored", 0).
    """
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_train, args=(recipe, run, hold_in_save_at, theirs))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def wait_for(connection, kind: str, at_least: int = 0):
    """The value of the next message of this kind, for numbers the next one of at least `at_least`."""
    while True:
        name, value = connection.recv()
        if name == kind and (kind == "result" or value >= at_least):
            return value


def _train(recipe, run: Path, hold_in_save_at: int | None, connection) -> None:
    import torch

    from fusedlm.runs import metrics, writer
    from fusedlm.train import train

    torch.set_num_threads(1)
    write, write_tensor_file = metrics.MetricsFile.write, writer.write_tensor_file
    lock = threading.Lock()  # checkpoints are written by a thread of their own

    def tell(*message):
        with lock:
            connection.send(message)

    def telling_write(self, record):
        write(self, record)
        if "loss" in record:
            tell("step", record["step"])

    def holding_write(path, *arguments, **options):
        found = write_tensor_file(path, *arguments, **options)
        if path.parent.name == f".fusedlm-step-{hold_in_save_at:08d}.tmp":
            tell("saving", hold_in_save_at)
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                connection.poll(0.01)
            tell("handlers restored", 0)
            connection.recv()
        return found

    metrics.MetricsFile.write = telling_write
    if hold_in_save_at is not None:
        writer.write_tensor_file = holding_write
    tell("result", train(recipe, run, resume=True))
