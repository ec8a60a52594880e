"""The recipe of a run: that of a checkpoint, which has a checksum, and how RUN/recipe.yaml differs from it."""

import logging
from pathlib import Path

from fusedlm.config import Recipe, load_recipe, parse_recipe
from fusedlm.config.keys import differences
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.choose import known_identity, newest_intact
from fusedlm.runs.folder import CHECKPOINTS, RECIPE, require_run, shown
from fusedlm.runs.identity import Identity
from fusedlm.runs.state import STATE, TrainState

_log = logging.getLogger(__name__)


def checkpoint_recipe(checkpoints: Checkpoints, step: int) -> Recipe:
    """The recipe in a verified checkpoint. Raises ValueError if it is not valid in this version."""
    text = checkpoints.read_text(step, RECIPE)
    try:
        return parse_recipe(text)
    except ValueError as error:
        raise ValueError(f"recipe {checkpoints.path(step) / RECIPE}: {error}") from None


def run_recipe(run_dir: Path) -> Recipe:
    """The recipe of a run, from its newest intact checkpoint; RUN/recipe.yaml if there is none yet. Warns of a change.

    Raises:
        ValueError: the folder holds no run, or its recipe is not valid.
        OSError: the system cannot read a file.
    """
    require_run(run_dir)
    checkpoints, identity = Checkpoints(run_dir / CHECKPOINTS), known_identity(run_dir)
    state = newest_intact(checkpoints, identity and identity.run, only=(STATE, RECIPE)).state
    if state is None:
        return load_recipe(run_dir / RECIPE)
    recipe = checkpoint_recipe(checkpoints, state.step)
    if change := recipe_change(run_dir, identity, state, recipe):
        _log.warning("%s", change)
    return recipe


def recipe_change(run_dir: Path, identity: Identity | None, state: TrainState, recipe: Recipe) -> str | None:
    """A sentence if RUN/recipe.yaml was changed since it was written, or could have been and differs; else None.

    A recipe may differ from that of a checkpoint without having been changed: resuming with more steps writes it again.

    Args:
        state, recipe: of the checkpoint.
    """
    path = run_dir / RECIPE
    if identity is not None and identity.wrote(path) and state.run is not None:
        return None
    try:
        found = load_recipe(path)
    except ValueError as error:
        return f"{error}; the recipe of the checkpoint of step {state.step} is used"
    for key, there, kept in differences(found.model_dump(mode="json"), recipe.model_dump(mode="json")):
        return (
            f"{path} is not the recipe of the checkpoint of step {state.step}: {key} is {shown(there)} there and "
            f"{shown(kept)} in the checkpoint, whose recipe is used"
        )
    return None
