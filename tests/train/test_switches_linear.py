"""Every key of the linear mixers changes the losses of a run."""

import pytest

from tests.train.runs import short_losses

MIXERS = {
    "g": "{type: sdla, n_heads: 2, rope_dim: 4, chunk_size: 8}",
    "a": "{type: mamba2, n_heads: 2, state_dim: 8, chunk_size: 8}",
}
BASE = [f"model.blocks.{block}.mixer={mixer}" for block, mixer in MIXERS.items()]


@pytest.fixture(scope="module")
def base_losses(tmp_path_factory):
    return short_losses(tmp_path_factory.mktemp("switches"), *BASE)


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
    assert short_losses(tmp_path, *BASE, override) != base_losses


def test_the_same_recipe_gives_the_same_losses(base_losses, tmp_path):
    """Without this, the test above could not fail."""
    assert short_losses(tmp_path, *BASE) == base_losses
