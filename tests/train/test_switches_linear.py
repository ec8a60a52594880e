"""Every switch of the linear mixers changes the losses of a run."""

import pytest

from fusedlm.train import train
from tests.train.runs import losses, tiny_recipe

MIXERS = {
    "g": "{type: sdla, n_heads: 2, rope_dim: 4, chunk_size: 8}",
    "a": "{type: mamba2, n_heads: 2, state_dim: 8, chunk_size: 8}",
}
BASE = [
    "train.steps=3",
    "train.eval_every=0",
    "train.checkpoint_every=0",
    "train.ema=null",
    *(f"model.blocks.{block}.mixer={mixer}" for block, mixer in MIXERS.items()),
]


@pytest.fixture(scope="module")
def base_losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switches")
    train(tiny_recipe(folder, *BASE), folder / "run")
    return losses(folder / "run")


@pytest.mark.parametrize(
    "override",
    [
        "model.blocks.g.mixer.lambda_init=0.5",
        "model.blocks.g.mixer.memory=false",
        "model.blocks.g.mixer.rope_dim=0",
        "model.blocks.g.mixer.rope_base=10",
        "model.blocks.g.mixer.rank=8",
        "model.blocks.g.mixer.head_dim=4",
        "model.blocks.a.mixer.state_dim=4",
        "model.blocks.a.mixer.n_groups=2",
        "model.blocks.a.mixer.conv_size=2",
        "model.blocks.a.mixer.head_dim=8",
    ],
)
def test_changes_the_losses(base_losses, tmp_path, override):
    train(tiny_recipe(tmp_path, *BASE, override), tmp_path / "run")
    changed = losses(tmp_path / "run")
    assert len(changed) == 3 and changed != base_losses


def test_the_same_recipe_gives_the_same_losses(base_losses, tmp_path):
    """Without this the test above could not fail."""
    train(tiny_recipe(tmp_path, *BASE), tmp_path / "run")
    assert losses(tmp_path / "run") == base_losses
