import shutil

import pytest

from fusedlm.train import train
from tests.train.runs import tiny_recipe


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(recipe, run folder) of the tiny recipe, trained without interruption; read-only."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = tiny_recipe(folder)
    train(recipe, folder / "run")
    return recipe, folder / "run"


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the finished run."""
    recipe, run = trained
    return recipe, shutil.copytree(run, tmp_path / "run")
