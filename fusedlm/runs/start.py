"""Where a training run starts: at its newest checkpoint that can be used, or from the beginning."""

from collections.abc import Callable
from dataclasses import dataclass

from fusedlm.config import Recipe
from fusedlm.runs.checkpoint import DamagedCheckpoint
from fusedlm.runs.choose import foreign_steps, newest_intact
from fusedlm.runs.folder import RunFolder
from fusedlm.runs.identity import IDENTITY, Identity, new_run_id, read_identity
from fusedlm.runs.quantization import is_quantized
from fusedlm.runs.recipe import checkpoint_recipe, recipe_change
from fusedlm.runs.state import TrainState


@dataclass(frozen=True)
class Start:
    """run: id of the run. identity: as saved; None: there is none, or it is damaged.
    state, recipe: of a verified checkpoint; None: start from the beginning.
    refused: checkpoints that cannot be used, and why. notes: sentences for the user."""

    run: str
    identity: Identity | None
    state: TrainState | None
    recipe: Recipe | None
    refused: list[tuple[int, DamagedCheckpoint]]
    notes: list[str]


def find_start(folder: RunFolder) -> Start:
    """The start of a run in a locked folder. Removes the leftovers of an interrupted save, and changes nothing else.

    Raises:
        OSError: the system cannot read a file, which says nothing about its content.
        ValueError: a checkpoint is of another version.
    """
    if not folder.holds_run():
        return Start(new_run_id(), None, None, None, [], [])
    folder.checkpoints.clean()
    notes, identity = [], None
    try:
        identity = read_identity(folder.path)
    except ValueError as error:
        notes.append(f"warning: {error}")
    found = newest_intact(folder.checkpoints, identity and identity.run)
    state, refused, recipe = found.state, found.refused, None
    run = identity.run if identity else (state and state.run) or new_run_id()
    if state is not None:
        if is_quantized(folder.checkpoints, state.step):
            raise ValueError(
                f"run {folder.path} has quantised weights, which are not trained; resume the run that they are from"
            )
        recipe = checkpoint_recipe(folder.checkpoints, state.step)
        refused += foreign_steps(folder.checkpoints, run, before=state.step)
        if identity is None and not notes and state.run is not None:
            notes.append(f"warning: {folder.path / IDENTITY}: missing; it is written again")
        if change := recipe_change(folder.path, identity, state, recipe):
            notes.append(f"warning: {change}")
    return Start(run, identity, state, recipe, refused, notes)


def set_aside(folder: RunFolder, start: Start, note: Callable[[str], None]) -> None:
    """Rename the checkpoints that cannot be used, each with a note.

    Raises:
        ValueError: there are checkpoints, and none can be used.
    """
    for step, damage in start.refused:
        kept = folder.checkpoints.set_aside(step, damage.kind)
        instead = ", using the one before it" if start.state is None or step > start.state.step else ""
        note(f"warning: {damage.kind} checkpoint: {damage}; kept as {kept.name}{instead}")
    names = folder.checkpoints.set_aside_names()
    if start.state is None and names:
        raise ValueError(
            f"run {folder.path} has no intact checkpoint (set aside: {', '.join(names)}); "
            "start a new run in another folder with --out"
        )
