"""A trained model out of its run folder."""

import logging
from pathlib import Path
from typing import Literal

import torch

from fusedlm.config import Recipe, load_recipe
from fusedlm.data import load_tokenizer
from fusedlm.model import Decoder, build_model
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.train.checkpoint import Checkpoints, DamagedCheckpoint
from fusedlm.train.folder import CHECKPOINTS, RECIPE
from fusedlm.train.state import EMA, MODEL, STATE, load_model_tensors, read_progress

_log = logging.getLogger(__name__)


def load(
    run_dir: str | Path,
    *,
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Literal["model", "ema"] = "model",
    device: str = "auto",
):
    """A model as a run left it, in eval mode; needs nothing outside the run folder.

    Args:
        checkpoint: "last" (a damaged one is named in a warning and the one before it is used), "best" (lowest
            validation bits per byte among the checkpoints) or a step.
        weights: "model", or "ema" for the moving average.
        device: auto, cpu or cuda.

    Returns:
        (Decoder with float32 parameters, Tokenizer, Recipe).

    Raises:
        ValueError: the folder holds no run, the checkpoint does not exist or is damaged, or it has no averaged weights.
    """
    run_dir = Path(run_dir)
    if weights not in ("model", "ema"):
        raise ValueError(f"weights {weights!r} is neither model nor ema")
    _require_run(run_dir)
    recipe = load_recipe(run_dir / RECIPE)
    if weights == "ema" and recipe.train.ema is None:
        raise ValueError(f"run {run_dir} has no averaged weights; train with train.ema, or use weights model")
    target = resolve_device(device)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    step = choose_checkpoint(run_dir, checkpoint)
    tokenizer = load_tokenizer(run_dir)
    model = _build(recipe, tokenizer.vocab_size, target)
    tensors = checkpoints.read_tensors(step, MODEL)
    if weights == "ema":
        # Buffers are not averaged: they come from the model's own file.
        tensors |= checkpoints.read_tensors(step, EMA)
    load_model_tensors(model, tensors, str(checkpoints.path(step)))
    return model.eval(), tokenizer, recipe


def _build(recipe: Recipe, vocab_size: int, device: torch.device) -> Decoder:
    # The initial weights are replaced: drawing them must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        return build_model(
            recipe.model, vocab_size=vocab_size, device=device, dtype=resolve_dtype(recipe.train.dtype, device)
        )


def _require_run(run_dir: Path) -> None:
    if not (run_dir / RECIPE).is_file():
        raise ValueError(f"{run_dir} holds no run; train one with: fusedlm train RECIPE --out {run_dir}")


def choose_checkpoint(run_dir: str | Path, wanted: Literal["last", "best"] | int) -> int:
    """The step whose weights `load` reads for these words, its files verified; errors as there."""
    run_dir = Path(run_dir)
    _require_run(run_dir)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"run {run_dir} has no checkpoint yet; go on with it by: fusedlm train --resume")
    if wanted == "last":
        return _newest_intact(checkpoints, run_dir)
    if wanted == "best":
        best = read_progress(checkpoints, _newest_intact(checkpoints, run_dir)).best_step
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
    """What `load` reads; the optimizer's state, twice the size of the model, is left alone."""
    files = checkpoints.files(step)
    wanted = [f"{MODEL}.safetensors", f"{EMA}.safetensors", STATE]
    checkpoints.verify(step, only=tuple(name for name in wanted if name in files))
