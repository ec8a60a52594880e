"""From a recipe to a run folder: what is checked, and in which order, before the first step."""

from pathlib import Path

from rich.console import Console

from fusedlm.config import Recipe
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.train.checkpoint import Checkpoints, DamagedCheckpoint
from fusedlm.train.folder import RunFolder
from fusedlm.train.hardware import numerics
from fusedlm.train.loggers import check_loggers
from fusedlm.train.progress import Display
from fusedlm.train.trainer import Trainer, TrainResult


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    display: Display | None = None,
) -> TrainResult:
    """Train a recipe into a folder, preparing its text first.

    On the first SIGINT or SIGTERM (when called in the main thread) the step is finished and saved, and the result says
    so; resuming gives the losses of never having stopped, bit for bit. Resuming a folder without a run starts one.

    Args:
        recipe: on resuming it must equal the run's own, but for keys that the steps do not depend on and a larger
            `train.steps`.
        run_dir: RUN/, holding recipe.yaml, environment.json, the tokenizer, metrics.jsonl and checkpoints/.
        console: where progress is shown; None: nowhere.
        display: what shows it, in place of the usual one on `console`.

    Raises:
        ValueError: the folder holds a run and `resume` is not set, or is in use, or its run is of another recipe or
            text, or none of its checkpoints is intact; a logger's package is missing; the recipe's data, model or
            device cannot be had.
        TrainingDiverged: `train.max_bad_steps` steps in a row had no finite loss and gradient; a ValueError.
        OSError: the disk is full or the folder cannot be written; checkpoints written before stay valid.
    """
    check_loggers(recipe.train.loggers)
    device = resolve_device(recipe.train.device)
    dtype = resolve_dtype(recipe.train.dtype, device)
    display = display or Display(console)
    try:
        with RunFolder(Path(run_dir)) as folder, numerics(device, dtype, recipe.train.deterministic):
            steps_before = folder.admit(recipe, resume)
            if steps_before is not None:
                display.note(
                    f"the run grows from {steps_before} to {recipe.train.steps} steps; the schedule is now that of "
                    f"{recipe.train.steps}"
                )
            checkpoint = _intact_checkpoint(folder.checkpoints, folder.path, display)
            return Trainer(recipe, folder, device, dtype, display, checkpoint).run()
    finally:
        display.close()


def _intact_checkpoint(checkpoints: Checkpoints, run_dir: Path, display: Display) -> int | None:
    """Step of the newest checkpoint that is intact, damaged ones before it named and set aside; None: none was written.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    checkpoints.clean()
    for step in reversed(checkpoints.steps()):
        try:
            checkpoints.verify(step)
        except DamagedCheckpoint as damage:
            kept = checkpoints.set_aside(step)
            display.note(f"warning: damaged checkpoint: {damage}; kept as {kept.name}, using the one before it")
        else:
            return step
    damaged = checkpoints.set_aside_names()
    if damaged:
        raise ValueError(
            f"run {run_dir} has no intact checkpoint (damaged: {', '.join(damaged)}); "
            "start anew in another folder with --out"
        )
    return None
