"""Asynchronous checkpoints."""

import os
import resource
import threading
from contextlib import suppress

import pytest
import torch

from fusedlm.distributed import World
from fusedlm.runs import writer as writer_module
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.metrics import MetricsFile, read_metrics
from fusedlm.runs.writer import CheckpointWriter
from fusedlm.train import train
from tests.train.runs import assert_same_run, checkpoint_names, records, tiny_recipe

TEXTS = {"state.json": '{"step": 1}\n'}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def made(checkpoints, *, in_background=True, keep=9) -> CheckpointWriter:
    return CheckpointWriter(checkpoints, World(), keep=keep, in_background=in_background, device=torch.device("cpu"))


class Gate:
    """Holds the threads that write in front of their first file until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.reached = threading.Event(), threading.Event()
        write = writer_module.write_tensor_file

        def held(path, tensors, metadata, *, cancelled):
            self.reached.set()
            while not cancelled() and not self.open.wait(0.01):
                pass
            return write(path, tensors, metadata, cancelled=cancelled)

        monkeypatch.setattr(writer_module, "write_tensor_file", held)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def table(value: float) -> dict:
    return {"model": {"a": torch.full((3,), value)}}


def test_what_changes_after_the_beginning_is_not_in_the_checkpoint(checkpoints, gate):
    writer, tensors = made(checkpoints), table(1.0)
    writer.begin(1, tensors, TEXTS)
    tensors["model"]["a"].fill_(2.0)
    assert writer.is_writing and not writer.is_written and checkpoints.steps() == []
    gate.open.set()
    assert writer.finish() > 0 and not writer.is_writing
    checkpoints.verify(1)
    assert checkpoints.read_tensors(1, "model")["a"].tolist() == [1.0] * 3


def test_a_checkpoint_is_there_only_when_it_is_finished(checkpoints):
    writer = made(checkpoints)
    writer.begin(1, table(1.0), TEXTS)
    while not writer.is_written:
        pass
    assert checkpoints.steps() == [] and not (checkpoints.temporary(1) / "manifest.json").exists()
    writer.finish()
    assert checkpoints.steps() == [1] and not checkpoints.temporary(1).exists()


def test_a_second_checkpoint_waits_for_the_first(checkpoints, gate):
    writer = made(checkpoints, keep=1)
    writer.begin(1, table(1.0), TEXTS)
    second = threading.Thread(target=writer.begin, args=(2, table(2.0), TEXTS))
    second.start()
    gate.reached.wait()
    assert second.is_alive() and not checkpoints.temporary(2).exists()
    gate.open.set()
    second.join()
    assert checkpoints.steps() == [1]
    writer.finish()
    assert checkpoints.steps() == [2], "and the first is pruned"
    assert checkpoints.read_tensors(2, "model")["a"].tolist() == [2.0] * 3


def test_without_a_background_the_checkpoint_is_there_on_return(checkpoints):
    writer = made(checkpoints, in_background=False)
    writer.begin(3, table(1.0), TEXTS)
    assert checkpoints.steps() == [3] and not writer.is_writing
    checkpoints.verify(3)


def test_the_time_that_training_stands_still_is_counted_once(checkpoints, gate, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(writer_module.time, "perf_counter", lambda: float(next(clock)))
    writer = made(checkpoints)
    writer.begin(1, table(1.0), TEXTS)
    assert (writer.take_seconds(), writer.take_seconds()) == (1.0, 0.0)
    gate.open.set()
    assert writer.finish() == writer.take_seconds() == 1.0


def test_a_failed_write_is_one_line_and_the_last_checkpoint_stays(checkpoints):
    writer = made(checkpoints)
    writer.begin(1, table(1.0), TEXTS)
    writer.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        writer.begin(2, {"model": {"a": torch.zeros(5000)}}, TEXTS)
        with pytest.raises(OSError) as caught:
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    expected = f"checkpoint {checkpoints.path(2)} could not be written: File too large; the last one is "
    assert str(caught.value) == expected + str(checkpoints.path(1))
    assert os.listdir(checkpoints.directory) == ["step-00000001"]
    checkpoints.verify(1)
    writer.begin(3, table(3.0), TEXTS)  # nothing is left of the one that failed
    writer.finish()
    assert checkpoints.steps() == [1, 3]


def test_a_defect_in_the_thread_is_raised_as_it_is(checkpoints):
    writer = made(checkpoints)
    writer.begin(1, {"model": {"a": torch.zeros(2, dtype=torch.complex64)}}, TEXTS)
    with pytest.raises(TypeError, match="complex64"):
        writer.finish()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_ends_what_is_being_written(checkpoints, gate, error):
    with suppress(error), made(checkpoints) as writer:
        writer.begin(1, table(1.0), TEXTS)
        if error is RuntimeError:
            gate.open.set()
        raise error
    assert checkpoints.steps() == ([1] if error is RuntimeError else [])
    assert not checkpoints.temporary(1).exists() and not writer.is_writing


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, gate, monkeypatch):
    """That of step 4 is not written before step 7 is recorded; the next one is that of the end."""
    write, kept = MetricsFile.write, {}

    def telling(self, record):
        write(self, record)
        kept.setdefault(record["step"], Checkpoints(tmp_path / "run/checkpoints").steps())
        if record["step"] == 7:
            gate.open.set()

    monkeypatch.setattr(MetricsFile, "write", telling)
    recipe = tiny_recipe(tmp_path, "train.steps=7", "train.checkpoint_every=4", "train.eval_every=0")
    train(recipe, tmp_path / "run")
    assert kept == dict.fromkeys(range(1, 8), [])
    assert checkpoint_names(tmp_path / "run") == ["step-00000004", "step-00000007"]
    found, _ = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in found if "checkpoint_seconds" in r] == [5]
    assert found[4]["checkpoint_seconds"] > 0


def test_a_full_disk_ends_training_with_one_line(tmp_path, monkeypatch):
    write, count = writer_module.write_tensor_file, []

    def full(path, *arguments, **options):
        count.append(path)
        if "step-00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(writer_module, "write_tensor_file", full)
    recipe = tiny_recipe(tmp_path, "train.steps=6", "train.checkpoint_every=2", "train.eval_every=0")
    run = tmp_path / "run"
    with pytest.raises(OSError) as caught:
        train(recipe, run)
    checkpoints = Checkpoints(run / "checkpoints")
    expected = f"checkpoint {checkpoints.path(4)} could not be written: No space left on device; the last one is "
    assert str(caught.value) == expected + str(checkpoints.path(2))
    assert checkpoint_names(run) == ["step-00000002"]
    monkeypatch.undo()
    train(recipe, run, resume=True)
    train(recipe, tmp_path / "straight")
    assert records(run) == records(tmp_path / "straight")


def test_a_run_is_the_same_whether_it_waits_for_its_checkpoints(tmp_path):
    for waits in ("true", "false"):
        options = ["train.steps=6", "train.checkpoint_every=1", "train.eval_every=3", f"train.checkpoint_async={waits}"]
        train(tiny_recipe(tmp_path, *options), tmp_path / waits)
    assert_same_run(tmp_path / "true", tmp_path / "false")
