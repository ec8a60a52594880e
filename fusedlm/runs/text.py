"""The text of a run, by the fingerprint that its checkpoints hold."""

from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.data import PreparedData, open_prepared, prepare
from fusedlm.data.lookup import find_prepared, places
from fusedlm.data.meter import ReportProgress, silent

NO_TEXT = "none"  # the fingerprint of a run that was made of weights alone


def open_text(
    recipe: Recipe, fingerprint: str, run_dir: Path, *, remedy: str, progress: ReportProgress = silent
) -> PreparedData:
    """Open the prepared text of a run: the folder with this fingerprint, wherever run and text have moved
    (`fusedlm.data.lookup.places`). The source is read only if there is none, and must then hold the same text.

    Args:
        fingerprint: `TrainState.data` of a checkpoint.
        run_dir: from which folders that moved with the run are found.
        remedy: what else the user can do, for the error.

    Raises:
        ValueError: the folder is damaged, or there is none and the source has changed or is gone.
        OSError: a file cannot be read, or the folder not be written.
    """
    if fingerprint == NO_TEXT:
        raise ValueError(f"{run_dir}: its model is of another program, and has no text of its own; {remedy}")
    folder = find_prepared(fingerprint, places(recipe.data.dir, run_dir))
    if folder is not None:
        return open_prepared(folder, fingerprint=fingerprint, progress=progress)
    try:
        return prepare(recipe.data, progress, fingerprint=fingerprint)
    except ValueError as error:
        raise ValueError(
            f"the prepared text of the run (fingerprint {fingerprint[:12]}) is not in data.dir={recipe.data.dir} and "
            f"cannot be prepared again: {error}; {remedy}"
        ) from None
