"""Every key of the routed feed-forward changes the losses of a run."""

import pytest

from tests.train.runs import short_losses

ROUTED = ["model.blocks.a.ffn={type: routed, hidden: 32}"]


@pytest.fixture(scope="module")
def base_losses(tmp_path_factory):
    return short_losses(tmp_path_factory.mktemp("switches"), *ROUTED)


@pytest.mark.parametrize(
    "override", ["hidden=48", "light=0.6", "low=0.1", "high=0.9", "n_classes=4", "budget=0.2", "budget_weight=0.1"]
)
def test_changes_the_losses(base_losses, tmp_path, override):
    assert short_losses(tmp_path, *ROUTED, f"model.blocks.a.ffn.{override}") != base_losses


def test_the_same_recipe_gives_the_same_losses(base_losses, tmp_path):
    """Without this, the test above could not fail."""
    assert short_losses(tmp_path, *ROUTED) == base_losses
