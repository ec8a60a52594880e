"""Train a recipe into a run folder: the checks before the first step."""

import contextlib
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from fusedlm.config import Recipe
from fusedlm.distributed import OneProcessFailed, World, processes
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.ops.common import check_backends
from fusedlm.runs.folder import RunFolder
from fusedlm.runs.hardware import numerics
from fusedlm.runs.start import Start, find_start, set_aside
from fusedlm.terminal import one_line
from fusedlm.train.display import Display
from fusedlm.train.loggers import check_loggers
from fusedlm.train.parallel import build_mesh
from fusedlm.train.teacher import open_teacher
from fusedlm.train.trainer import Trainer, TrainingDiverged, TrainResult
from fusedlm.train.undo import StartUndo


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    display: Display | None = None,
    text: str | None = None,
    strict_backends: bool = True,
) -> TrainResult:
    """Train a recipe into a run folder. Prepares the text first.

    On the first SIGINT, SIGTERM or SIGHUP (if called in the main thread) the current step is finished and saved. A
    resumed run has the losses of an uninterrupted one, bit for bit. A start that fails before its second step leaves
    nothing in the folder. Resuming a folder without a run starts one.

    The processes that torchrun has started, or that share torch.distributed's default group, train one run together:
    all call this and get the same result (docs/many-gpus.md).

    Args:
        recipe: to resume, it must equal the recipe of the run, except for neutral keys, a larger `train.steps`, and on
            another kind of device the section `runtime` (`fusedlm.runs.folder.check_resumable`).
        run_dir: RUN/, with recipe.yaml, environment.json, the tokenizer, metrics.jsonl and checkpoints/.
        console: shows the progress; None: not shown.
        display: shows the progress, instead of the default one on `console`.
        text: fingerprint of the prepared text to train on, for runs that must share it; None: that of the run to
            resume, or of what the source holds now.
        strict_backends: whether a backend of `runtime.backends` that cannot run here is an error. If not, a warning
            names it and "auto" is used.

    Raises:
        ValueError: the folder holds a run and `resume` is not set, or is in use, or its run has another recipe or text,
            or no intact checkpoint; a logger's package is missing; the recipe does not fit the data or the device;
            the teacher of `train.distill` cannot be read, has another tokenizer, or is not that of the run to resume.
        TrainingDiverged: loss or gradient norm was not finite in `train.max_bad_steps` steps in a row. A ValueError.
        OSError: the disk is full, the folder cannot be written, or a file cannot be read; checkpoints stay valid.
    """
    check_loggers(recipe.train.loggers)
    check_backends(recipe.runtime.backends, "runtime.backends")
    with processes(resolve_device(recipe.runtime.device)) as (world, device):
        display = (display or Display(console)) if world.is_main else Display(None)
        options = {"text": text, "strict_backends": strict_backends}
        return _train(recipe, Path(run_dir), resume, display, world, device, options)


def _train(
    recipe: Recipe, run_dir: Path, resume: bool, display: Display, world: World, device: torch.device, options: dict
) -> TrainResult:
    """options: of `Trainer`."""
    dtype = resolve_dtype(recipe.runtime.dtype, device)
    mesh = build_mesh(recipe, world, device.type)
    undo = StartUndo(run_dir)
    try:
        with RunFolder(run_dir, world) as folder, contextlib.ExitStack() as stack:
            if world.is_main:
                stack.enter_context(undo.run_taken_back(folder, keep=TrainingDiverged))
            stack.enter_context(numerics(device, dtype, recipe.runtime.deterministic))
            start = world.on_main(lambda: _find_start(folder, recipe, device, resume, display))
            opening = partial(open_teacher, recipe, start.recipe, device, dtype)
            recipe, options["teacher"] = world.together(opening)
            return Trainer(recipe, folder, device, dtype, display, start, **options, world=world, mesh=mesh).run()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = one_line(str(error))[:200]
        advice = "lower train.micro_batch_size, model.dim or model.n_layers"
        raise OneProcessFailed(f"out of memory on {device.type} ({reason}); {advice}") from None
    finally:
        display.close()
        if world.is_main:
            undo.remove_empty_folders()


def _find_start(folder: RunFolder, recipe: Recipe, device: torch.device, resume: bool, display: Display) -> Start:
    folder.check_resume(resume)
    start = find_start(folder)
    for note in [*start.notes, *folder.check_recipe(recipe, device.type, start.recipe, start.identity)]:
        display.note(note)
    set_aside(folder, start, display.note)
    return start


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    # torch has a type of its own for GPUs only.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
