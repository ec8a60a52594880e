"""Loggers get every record, and are closed."""

import sys
import types

import pytest

from fusedlm.train import train
from tests.train.runs import losses, tiny_recipe


class Recorder:
    """In place of the module wandb and of its run."""

    def __init__(self):
        self.inits, self.logged, self.finished = [], [], 0
        # importlib.util.find_spec asks a module in sys.modules for this.
        self.__spec__ = types.SimpleNamespace(name="wandb")

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path, "train.loggers=[wandb]", "train.steps=2", "train.eval_every=1")


def test_wandb_gets_every_record_and_resumes_under_one_id(recipe, tmp_path, monkeypatch):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(recipe, tmp_path / "run")
    train(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 3})}), tmp_path / "run", resume=True
    )
    assert [step for step, _ in wandb.logged] == [1, 1, 2, 2, 3, 3]
    assert [numbers["loss"] for _, numbers in wandb.logged if "loss" in numbers] == losses(tmp_path / "run")
    assert all(isinstance(value, int | float) for _, numbers in wandb.logged for value in numbers.values())
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["config"]["name"] == "tiny"
    assert wandb.finished == 2


def test_loggers_are_closed_when_training_fails(recipe, tmp_path, monkeypatch):
    wandb = Recorder()
    wandb.log = None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(TypeError):
        train(recipe, tmp_path / "run")
    assert wandb.finished == 1


def test_tensorboard_writes_events(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"loggers": ["tensorboard"]})})
    train(other, tmp_path / "run")
    assert any((tmp_path / "run/tensorboard").iterdir())
