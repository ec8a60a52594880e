"""Which checkpoint of a run is read: intact, of this run, and of the step that its name says."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint, ForeignCheckpoint, RemovedCheckpoint
from fusedlm.runs.folder import CHECKPOINTS
from fusedlm.runs.identity import Identity, read_identity
from fusedlm.runs.state import AVERAGES, MODEL, QUANTIZATION, RECIPE, STATE, TrainState, examine

_log = logging.getLogger(__name__)

# The tables and files that `load` reads, without the optimizer state, which is larger than the model.
LOADED = (MODEL, *AVERAGES, STATE, RECIPE, QUANTIZATION)


@dataclass(frozen=True)
class Found:
    """state: of the newest checkpoint that can be used; None: there is none. refused: the newer ones, newest first,
    and why."""

    state: TrainState | None
    refused: list[tuple[int, DamagedCheckpoint]]


def newest_intact(checkpoints: Checkpoints, run: str | None, only: Sequence[str] | None = None) -> Found:
    """Changes nothing. `run` and `only` as `examine` takes them.

    Raises:
        OSError: the system cannot read a checkpoint, which says nothing about its content.
        ValueError: a checkpoint is of another version.
    """
    refused = []
    for step in reversed(checkpoints.steps()):
        try:
            return Found(examine(checkpoints, step, run, only), refused)
        except RemovedCheckpoint:
            continue
        except DamagedCheckpoint as damage:
            refused.append((step, damage))
    return Found(None, refused)


def foreign_steps(checkpoints: Checkpoints, run: str, before: int) -> list[tuple[int, DamagedCheckpoint]]:
    """The checkpoints before a step that are of another run or step, and why. The others are not examined further."""
    found = []
    for step in checkpoints.steps():
        if step < before:
            try:
                with suppress(OSError):
                    examine(checkpoints, step, run, only=(STATE,))
            except ForeignCheckpoint as foreign:
                found.append((step, foreign))
            except ValueError:
                continue  # damaged, or of another version: nothing that this run would read
    return found


def known_identity(run_dir: Path) -> Identity | None:
    """run.json, None if there is none or, with a warning, if it is damaged."""
    try:
        return read_identity(run_dir)
    except ValueError as error:
        _log.warning("%s", error)
        return None


def choose(run_dir: Path, wanted: Literal["last", "best"] | int, run: str | None) -> TrainState:
    """The state of the checkpoint that an argument of `fusedlm.load` names, the files that are loaded verified.

    Raises:
        RemovedCheckpoint: a run that is training has removed it meanwhile; choose again.
        ValueError, OSError: as `fusedlm.load`.
    """
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"run {run_dir} has no checkpoint yet; resume it with: fusedlm train --resume")
    if wanted == "last":
        return _newest(checkpoints, run_dir, run)
    if wanted == "best":
        newest = _newest(checkpoints, run_dir, run)
        best = newest.best_step
        # Listed again: the best one may be newer than the first list.
        if best not in checkpoints.steps():
            raise ValueError(f"run {run_dir} has no validated checkpoint yet; use checkpoint last")
        return newest if best == newest.step else examine(checkpoints, best, run, LOADED)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted not in steps:
        raise ValueError(
            f"run {run_dir} has no checkpoint {wanted!r}; it has last, best and {', '.join(map(str, steps))}"
        )
    return examine(checkpoints, wanted, run, LOADED)


def _newest(checkpoints: Checkpoints, run_dir: Path, run: str | None) -> TrainState:
    found = newest_intact(checkpoints, run, LOADED)
    if found.state is None and not found.refused:
        raise RemovedCheckpoint(f"run {run_dir}: every checkpoint was removed while it was read")
    if found.state is None:
        reasons = "; ".join(str(damage) for _, damage in reversed(found.refused))
        raise ValueError(f"run {run_dir} has no intact checkpoint: {reasons}")
    for _, damage in found.refused:
        _log.warning("%s checkpoint: %s; using the one before it", damage.kind, damage)
    return found.state
