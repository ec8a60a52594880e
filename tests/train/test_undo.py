"""A start that fails leaves nothing behind, and the same command starts again."""

import shutil
import sys

import pytest

from fusedlm.data import Loader
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.train import TrainingDiverged, loggers, train, trainer
from tests.train.runs import SHORT, losses, tiny_recipe


class Broken(Exception):
    pass


def fail(*arguments, **options):
    raise Broken


def fail_at(call: int, function):
    """The function, which raises at one of its calls."""
    calls = iter(range(1, 1000))

    def failing(*arguments, **options):
        if next(calls) == call:
            raise Broken
        return function(*arguments, **options)

    return failing


WAYS = {
    "data": lambda patch: patch.setattr(trainer, "prepare", fail),
    "model": lambda patch: patch.setattr(trainer, "build_model", fail),
    "backends": lambda patch: patch.setattr(trainer, "use_backends", fail),
    "header": lambda patch: patch.setattr("fusedlm.runs.folder.dump_recipe", fail),
    "loader": lambda patch: patch.setattr(Loader, "__iter__", fail),
    "first step": lambda patch: patch.setattr(trainer, "train_step", fail),
    "second step": lambda patch: patch.setattr(trainer, "train_step", fail_at(2, trainer.train_step)),
    "metrics": lambda patch: patch.setattr("fusedlm.runs.metrics.MetricsFile.write", fail),
}


@pytest.mark.parametrize("break_it", WAYS.values(), ids=WAYS)
def test_a_failed_start_leaves_nothing(tmp_path, monkeypatch, break_it):
    recipe = tiny_recipe(tmp_path, *SHORT, "train.loggers=[csv]", "data.tokenizer={type: bpe, vocab_size: 270}")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_it(patch)
        train(recipe, tmp_path / "new/deep/run")
    assert not (tmp_path / "new").exists()


def test_what_was_there_before_stays_and_the_next_start_succeeds(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, *SHORT)
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    (run / "tensorboard/events").write_text("mine")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(trainer, "train_step", fail)
        train(recipe, run)
    assert sorted(path.relative_to(run).as_posix() for path in run.rglob("*")) == [
        "notes.txt",
        "tensorboard",
        "tensorboard/events",
    ]
    train(recipe, run)
    assert len(losses(run)) == 3 and (run / "notes.txt").read_text() == "mine"


def test_work_is_never_taken_back(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, *SHORT)
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(trainer, "train_step", fail_at(3, trainer.train_step))
        train(recipe, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2

    saved = tiny_recipe(tmp_path, *SHORT, "train.checkpoint_every=1")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(trainer, "train_step", fail_at(2, trainer.train_step))
        train(saved, tmp_path / "saved")
    assert Checkpoints(tmp_path / "saved/checkpoints").steps() == [1]

    nan = tiny_recipe(tmp_path, *SHORT, "train.max_bad_steps=1")
    with monkeypatch.context() as patch, pytest.raises(TrainingDiverged):
        patch.setattr(trainer.Trainer, "_step", diverge)
        train(nan, tmp_path / "diverged")
    assert len(losses(tmp_path / "diverged")) == 1


def diverge(self, batch, loader):
    self._record({"step": 1, "loss": None})
    raise TrainingDiverged("not finite")


def test_a_run_that_was_there_is_left_as_it_is(trained, tmp_path, monkeypatch):
    """A longer recipe is not written before everything has started: the next resume may have the old length."""
    recipe, straight = trained
    run = shutil.copytree(straight, tmp_path / "run")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changes = {"steps": 14, "loggers": ["wandb"]}
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
    monkeypatch.setattr(loggers, "check_loggers", lambda names: None)
    monkeypatch.setattr("fusedlm.train.loop.check_loggers", lambda names: None)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    with pytest.raises(ValueError, match="wandb cannot start"):
        train(longer, run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    assert Checkpoints(run / "checkpoints").steps() == [8, 12]


def test_a_run_without_a_checkpoint_is_left_as_it_is(tmp_path, monkeypatch):
    """It was killed while it wrote its header, and its id is in run.json."""
    recipe = tiny_recipe(tmp_path, *SHORT)
    train(recipe, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(trainer, "train_step", fail_at(2, trainer.train_step))
        train(recipe, tmp_path / "run", resume=True)
    assert len(losses(tmp_path / "run")) == 1


def test_out_of_memory_is_one_line(tmp_path, monkeypatch):
    def allocate(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: 8\nbytes")

    monkeypatch.setattr(trainer, "build_model", allocate)
    with pytest.raises(ValueError, match=r"out of memory on cpu \(.*memory: 8 bytes\); lower train.micro_batch_size"):
        train(tiny_recipe(tmp_path, *SHORT), tmp_path / "run")
    assert not (tmp_path / "run").exists()
