"""Every key of the routed feed-forward does something: turning it changes the losses of a run."""

import pytest

from fusedlm.train import train
from tests.train.runs import losses, tiny_recipe

BASE = ["train.steps=3", "train.eval_every=0", "train.checkpoint_every=0", "train.ema=null"]
ROUTED = ["model.blocks.a.ffn={type: routed, hidden: 32}"]


@pytest.fixture(scope="module")
def base_losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switches")
    train(tiny_recipe(folder, *BASE, *ROUTED), folder / "run")
    return losses(folder / "run")


@pytest.mark.parametrize(
    "override", ["hidden=48", "light=0.6", "low=0.1", "high=0.9", "n_classes=4", "budget=0.2", "budget_weight=0.1"]
)
def test_changes_the_losses(base_losses, tmp_path, override):
    train(tiny_recipe(tmp_path, *BASE, *ROUTED, f"model.blocks.a.ffn.{override}"), tmp_path / "run")
    changed = losses(tmp_path / "run")
    assert len(changed) == 3 and changed != base_losses


def test_the_same_recipe_gives_the_same_losses(base_losses, tmp_path):
    """Without this the test above could not fail."""
    train(tiny_recipe(tmp_path, *BASE, *ROUTED), tmp_path / "run")
    assert losses(tmp_path / "run") == base_losses
