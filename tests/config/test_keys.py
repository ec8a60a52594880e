"""Neutral keys, and the differences between two recipes."""

import pytest

from fusedlm.config import Recipe, parse_recipe
from fusedlm.config.keys import ABSENT, differences, is_neutral
from tests.config.test_recipe import SMALL


@pytest.mark.parametrize("key", ["description", "data.dir", "train.eval_every", "train.loggers.0", "runtime.recompute"])
def test_neutral_keys(key):
    assert is_neutral(key, Recipe)


@pytest.mark.parametrize(
    "key", ["train", "runtime", "data.source", "train.batch_size", "runtime.backends.attention", "model.dim", "name"]
)
def test_keys_that_change_results(key):
    assert not is_neutral(key, Recipe)


def test_differences_are_the_leaves_that_differ():
    before = parse_recipe(SMALL, ["runtime.backends={attention: sdpa, gated_scan: reference}"])
    now = parse_recipe(SMALL, ["runtime.backends={attention: auto}", "model.blocks.g.ffn.slope=0.5", "model.dim=32"])
    trees = (before.model_dump(mode="json"), now.model_dump(mode="json"))
    assert list(differences(*trees)) == [
        ("model.dim", 64, 32),
        ("model.blocks.g.ffn.slope", 0.0, 0.5),
        ("runtime.backends.attention", "sdpa", "auto"),
        ("runtime.backends.gated_scan", "reference", ABSENT),
    ]
    assert list(differences(*reversed(trees)))[-1] == ("runtime.backends.gated_scan", ABSENT, "reference")
    assert list(differences(trees[0], trees[0])) == []


def test_sections_of_another_type_differ_in_each_key():
    sgd = parse_recipe(SMALL, ["train.optimizer={type: sgd, lr: 1e-3, weight_decay: 0.1}"])
    found = list(differences(parse_recipe(SMALL).model_dump(mode="json"), sgd.model_dump(mode="json")))
    assert ("train.optimizer.type", "adamw", "sgd") in found
    assert ("train.optimizer.beta2", 0.95, ABSENT) in found and ("train.optimizer.momentum", ABSENT, 0.9) in found
    assert not any(key in ("train.optimizer.lr", "train.optimizer.weight_decay") for key, *_ in found)
