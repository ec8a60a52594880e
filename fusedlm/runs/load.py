"""Load a trained model from its run folder."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from fusedlm.config import Recipe, load_recipe
from fusedlm.config.recipe import with_overrides
from fusedlm.data import load_tokenizer
from fusedlm.data.tokenizer import Tokenizer
from fusedlm.model import Decoder, build_model
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.runs.backends import use_backends
from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint
from fusedlm.runs.folder import CHECKPOINTS, RECIPE
from fusedlm.runs.state import EMA, MODEL, STATE, load_model_tensors, read_state

_log = logging.getLogger(__name__)


def load(
    run_dir: str | Path,
    *,
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Literal["model", "ema"] = "model",
    device: str | torch.device = "auto",
    overrides: Sequence[str] = (),
) -> tuple[Decoder, Tokenizer, Recipe]:
    """The model of a run, in eval mode. Needs nothing outside the run folder.

    Args:
        checkpoint: "last" (a damaged one is skipped with a warning), "best" (lowest validation bits per byte among the
            checkpoints) or a step.
        weights: "model", or "ema" for the moving average.
        device: auto, cpu, cuda or cuda:N; need not be the one of training.
        overrides: `key=value` that replace the run's own `runtime.dtype` and `runtime.backends`, such as
            `runtime.backends.attention=sdpa`. Backends of the run that cannot run here are replaced by "auto" with a
            warning; those of an override are an error.

    Returns:
        The decoder, with float32 parameters; the tokenizer; and the recipe with the overrides.

    Raises:
        ValueError: the folder holds no run, the checkpoint does not exist or is damaged, it has no averaged weights, or
            an override is not valid.
    """
    run_dir = Path(run_dir)
    if weights not in ("model", "ema"):
        raise ValueError(f"weights={weights!r}: must be model or ema")
    _require_run(run_dir)
    recipe = with_overrides(load_recipe(run_dir / RECIPE), list(overrides), "runtime")
    _check_overrides(overrides)
    if weights == "ema" and recipe.train.ema is None:
        raise ValueError(f"run {run_dir} has no averaged weights; train with train.ema, or use weights model")
    target = resolve_device(device)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    step = choose_checkpoint(run_dir, checkpoint)
    tokenizer = load_tokenizer(run_dir)
    model = build_model(recipe.model, vocab_size=tokenizer.vocab_size, device="meta").to_empty(device=target)
    tensors = checkpoints.read_tensors(step, MODEL)
    if weights == "ema":
        # Buffers are not averaged; they come from the model's file.
        tensors |= checkpoints.read_tensors(step, EMA)
    load_model_tensors(model, tensors, str(checkpoints.path(step)))
    requested = any(override.startswith("runtime.backends") for override in overrides)
    use_backends(model, recipe.runtime, target, resolve_dtype(recipe.runtime.dtype, target), strict=requested)
    return model.eval(), tokenizer, recipe


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse keys that only training reads, which would be ignored here."""
    for override in overrides:
        key = override.partition("=")[0]
        if key == "runtime.device":
            raise ValueError(f"override {override!r}: choose the device of a trained run with --device")
        if key != "runtime.dtype" and not key.startswith("runtime.backends"):
            raise ValueError(
                f"override {override!r}: {key} is for training; a trained run takes runtime.dtype and runtime.backends"
            )


def _require_run(run_dir: Path) -> None:
    if not (run_dir / RECIPE).is_file():
        raise ValueError(f"{run_dir} holds no run; train one with: fusedlm train RECIPE --out {run_dir}")


def choose_checkpoint(run_dir: str | Path, wanted: Literal["last", "best"] | int) -> int:
    """The step that `load` reads for this argument, its files verified. Raises as `load`."""
    run_dir = Path(run_dir)
    _require_run(run_dir)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"run {run_dir} has no checkpoint yet; resume it with: fusedlm train --resume")
    if wanted == "last":
        return _newest_intact(checkpoints, run_dir)
    if wanted == "best":
        best = read_state(checkpoints, _newest_intact(checkpoints, run_dir)).best_step
        if best not in steps:
            raise ValueError(f"run {run_dir} has no validated checkpoint yet; use checkpoint last")
        wanted = best
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted not in steps:
        raise ValueError(
            f"run {run_dir} has no checkpoint {wanted!r}; it has last, best and {', '.join(map(str, steps))}"
        )
    _verify(checkpoints, wanted)
    return wanted


def _newest_intact(checkpoints: Checkpoints, run_dir: Path) -> int:
    damages = []
    for step in reversed(checkpoints.steps()):
        try:
            _verify(checkpoints, step)
        except DamagedCheckpoint as damage:
            damages.append(damage)
        else:
            for damage in damages:
                _log.warning("damaged checkpoint: %s; using the one before it", damage)
            return step
    raise ValueError(f"run {run_dir} has no intact checkpoint: {'; '.join(map(str, damages))}")


def _verify(checkpoints: Checkpoints, step: int) -> None:
    """Check the files that `load` reads, without the optimizer state, which is larger than the model."""
    files = checkpoints.files(step)
    wanted = [f"{MODEL}.safetensors", f"{EMA}.safetensors", STATE]
    checkpoints.verify(step, only=tuple(name for name in wanted if name in files))
