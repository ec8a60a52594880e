"""Load a trained model from its run folder."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from fusedlm.config import Recipe
from fusedlm.config.recipe import with_overrides
from fusedlm.data import load_tokenizer
from fusedlm.data.tokenizer import Tokenizer
from fusedlm.model import Decoder, build_model
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.runs.backends import use_backends
from fusedlm.runs.checkpoint import Checkpoints, RemovedCheckpoint
from fusedlm.runs.choose import choose, known_identity
from fusedlm.runs.folder import CHECKPOINTS, require_run
from fusedlm.runs.identity import IDENTITY
from fusedlm.runs.quantization import allocate_layers, decode_matrices, read_quantization
from fusedlm.runs.recipe import checkpoint_recipe, recipe_change
from fusedlm.runs.state import MODEL, QUANTIZATION, TrainState, load_model_tensors

_log = logging.getLogger(__name__)

_ATTEMPTS = 10

Weights = Literal["raw", "ema", "swa"]


def load(
    run_dir: str | Path,
    *,
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Weights = "raw",
    device: str | torch.device = "auto",
    overrides: Sequence[str] = (),
) -> tuple[Decoder, Tokenizer, Recipe]:
    """The model of a run, in eval mode. Needs nothing outside the run folder. A run that is training can be loaded.

    The recipe is that of the checkpoint; a warning says where RUN/recipe.yaml was changed.

    Args:
        checkpoint: "last" (a damaged or foreign one is skipped with a warning), "best" (lowest validation
            bits per byte among the checkpoints) or a step.
        weights: "raw", or an average that the run keeps: "ema", the moving one, or "swa", the mean near the end.
        device: auto, cpu, cuda or cuda:N; need not be the one of training.
        overrides: `key=value` that replace the run's own `runtime.dtype` and `runtime.backends`, such as
            `runtime.backends.attention=sdpa`. Backends of the run that cannot run here are replaced by "auto" with a
            warning; those of an override are an error.

    Returns:
        The decoder, with float32 parameters, and in a quantised run layers with codes and scales, or the values of
        integer matrices; the tokenizer; and the recipe with the overrides.

    Raises:
        ValueError: the folder holds no run, the checkpoint does not exist, is damaged or of another run or step, it has
            no averaged weights, the tokenizer is not the run's, or an override is not valid.
        OSError: the system cannot read a file.
    """
    loaded = load_checkpoint(run_dir, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides)
    return loaded.model, loaded.tokenizer, loaded.recipe


@dataclass(frozen=True)
class Loaded:
    """What `load` gives, the step of the checkpoint that was read, and the fingerprint of its prepared text."""

    model: Decoder
    tokenizer: Tokenizer
    recipe: Recipe
    step: int
    text: str


def load_checkpoint(
    run_dir: str | Path,
    *,
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Weights = "raw",
    device: str | torch.device = "auto",
    overrides: Sequence[str] = (),
) -> Loaded:
    """As `load`."""
    run_dir = Path(run_dir)
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r}: must be raw, ema or swa")
    require_run(run_dir)
    target = resolve_device(device)
    content = _read(run_dir, checkpoint, weights, overrides)
    recipe, state = content.recipe, content.state
    tokenizer = load_tokenizer(run_dir)
    if state.tokenizer not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{run_dir}: its tokenizer is not the one that the run was trained with; "
            f"restore it with: fusedlm train RECIPE --out {run_dir} --resume"
        )
    model = build_model(recipe.model, vocab_size=tokenizer.vocab_size, device="meta")
    tensors = content.tensors
    if content.quantization is not None:
        record = Path(content.source) / QUANTIZATION
        allocate_layers(model, content.quantization, record)
        tensors = decode_matrices(model, content.quantization, tensors, record)
    model.to_empty(device=target)
    load_model_tensors(model, tensors, content.source)
    return Loaded(ready(model, recipe, overrides), tokenizer, recipe, state.step, state.data)


def ready(model: Decoder, recipe: Recipe, overrides: Sequence[str]) -> Decoder:
    """A model with its weights, in eval mode and with the backends of its recipe. Those that cannot run here are
    replaced with a warning; raises ValueError if an override names them."""
    device = next(model.parameters()).device
    requested = any(override.startswith("runtime.backends") for override in overrides)
    use_backends(model, recipe.runtime, device, resolve_dtype(recipe.runtime.dtype, device), strict=requested)
    return model.eval()


@dataclass(frozen=True)
class _Content:
    """What is read from one checkpoint: tensors (on the CPU) by name; source names the checkpoint in errors;
    quantization: of its quantised layers, None: it has none."""

    state: TrainState
    recipe: Recipe
    tensors: dict[str, torch.Tensor]
    source: str
    quantization: dict | None


def _read(run_dir: Path, wanted: Literal["last", "best"] | int, weights: Weights, overrides: Sequence[str]) -> _Content:
    """Read a checkpoint. If a run that is training removes it meanwhile, the choice is made again."""
    checkpoints, identity = Checkpoints(run_dir / CHECKPOINTS), known_identity(run_dir)
    for _ in range(_ATTEMPTS):
        with suppress(RemovedCheckpoint):
            state = choose(run_dir, wanted, identity and identity.run)
            saved = checkpoint_recipe(checkpoints, state.step)
            recipe = with_overrides(saved, list(overrides), "runtime")
            check_overrides(overrides)
            tensors = checkpoints.read_tensors(state.step, MODEL)
            if weights != "raw":
                _check_average(run_dir, weights, recipe, state)
                # Buffers are not averaged; they come from the model's file.
                tensors |= checkpoints.read_tensors(state.step, weights)
            if state.run is not None and not (run_dir / IDENTITY).exists():
                _log.warning("%s: missing; fusedlm train --resume writes it again", run_dir / IDENTITY)
            if change := recipe_change(run_dir, identity, state, saved):
                _log.warning("%s", change)
            quantization = read_quantization(checkpoints, state.step)
            return _Content(state, recipe, tensors, str(checkpoints.path(state.step)), quantization)
    raise RemovedCheckpoint(f"run {run_dir} removes its checkpoints faster than they can be read; try again")


def _check_average(run_dir: Path, weights: str, recipe: Recipe, state: TrainState) -> None:
    """Raises ValueError if a checkpoint has no such average."""
    if getattr(recipe.train, weights) is None:
        raise ValueError(f"run {run_dir} has no {weights} weights; train with train.{weights}, or use weights raw")
    if not {"ema": state.ema_updates, "swa": state.swa_updates}[weights]:
        raise ValueError(
            f"run {run_dir} has no {weights} weights at step {state.step} yet; use weights raw, or a later checkpoint"
        )


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse keys that only training reads, which would be ignored here."""
    for override in overrides:
        key = override.partition("=")[0]
        if key == "runtime.device":
            raise ValueError(f"override {override!r}: choose the device of a trained run with --device")
        if key != "runtime.dtype" and not key.startswith("runtime.backends"):
            raise ValueError(
                f"override {override!r}: {key} is for training; a trained run takes runtime.dtype and runtime.backends"
            )
