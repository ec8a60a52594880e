"""Load a trained model from its run folder or from its packed artifact."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from fusedlm.config import Recipe
from fusedlm.config.recipe import with_overrides
from fusedlm.data.tokenizer import Tokenizer
from fusedlm.model import Decoder, build_model
from fusedlm.model.precision import resolve_device
from fusedlm.quant.artifact import Container, is_artifact
from fusedlm.quant.artifact.read import read_container
from fusedlm.quant.integer import IntegerMatrix
from fusedlm.runs.load import Loaded, Weights, check_overrides, ready
from fusedlm.runs.load import load_checkpoint as load_run
from fusedlm.runs.state import check_model_tensors, load_model_tensors, model_tensors


def load(
    path: str | Path,
    *,
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Weights = "raw",
    device: str | torch.device = "auto",
    overrides: Sequence[str] = (),
) -> tuple[Decoder, Tokenizer, Recipe]:
    """The model of a run folder or of an artifact of `fusedlm pack`, in eval mode. Needs nothing outside of it. A run
    that is training can be loaded.

    The recipe is that of the checkpoint; a warning says where RUN/recipe.yaml was changed.

    Args:
        checkpoint: of a run: "last" (a damaged or foreign one is skipped with a warning), "best" (lowest validation
            bits per byte among the checkpoints) or a step. An artifact has one.
        weights: of a run: "raw", or an average that it keeps: "ema", the moving one, or "swa", the mean near the end.
        device: auto, cpu, cuda or cuda:N; need not be the one of training.
        overrides: `key=value` that replace the run's own `runtime.dtype` and `runtime.backends`, such as
            `runtime.backends.attention=sdpa`. Backends of the run that cannot run here are replaced by "auto" with a
            warning; those of an override are an error.

    Returns:
        The decoder, with float32 parameters, those of an artifact its codes times its scales, and in a quantised run
        layers with codes and scales; the tokenizer; and the recipe with the overrides.

    Raises:
        ValueError: the folder holds no run, the checkpoint does not exist, is damaged or of another run or step, it has
            no averaged weights, the tokenizer is not the run's, an artifact is damaged, or an override is not valid.
        OSError: the system cannot read a file.
    """
    loaded = load_checkpoint(path, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides)
    return loaded.model, loaded.tokenizer, loaded.recipe


def load_checkpoint(
    path: str | Path,
    *,
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Weights = "raw",
    device: str | torch.device = "auto",
    overrides: Sequence[str] = (),
) -> Loaded:
    """As `load`."""
    path = Path(path)
    if not is_artifact(path):
        return load_run(path, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides)
    if checkpoint != "last" or weights != "raw":
        option = f"checkpoint {checkpoint!r}" if checkpoint != "last" else f"weights {weights!r}"
        raise ValueError(f"{path} is an artifact and has one checkpoint and its weights; leave out {option}")
    return _load_artifact(path, device, overrides)


def _load_artifact(path: Path, device: str | torch.device, overrides: Sequence[str]) -> Loaded:
    target, container = resolve_device(device), Container(path)
    artifact = read_container(container)
    recipe = with_overrides(artifact.recipe, list(overrides), "runtime")
    check_overrides(overrides)
    layers = recipe.model.n_layers
    if layers > len(artifact.tensors):
        raise container.damage("recipe", f"{layers} layers have more tensors than the {len(artifact.tensors)} here")
    model = build_model(recipe.model, vocab_size=artifact.tokenizer.vocab_size, device="meta")
    tensors = _values(model, artifact.tensors)
    check_model_tensors(model, tensors, str(path))  # before there is memory for it
    load_model_tensors(model.to_empty(device=target), tensors, str(path))
    return Loaded(ready(model, recipe, overrides), artifact.tokenizer, recipe, artifact.step, artifact.text)


def _values(model: torch.nn.Module, tensors: Mapping[str, IntegerMatrix | torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the tensors stand for. A stack of matrices, which is packed as one, gets its shape back."""
    own, found = model_tensors(model), {}
    for name, tensor in tensors.items():
        if isinstance(tensor, IntegerMatrix):
            tensor = tensor.values()
            shape = own[name].shape if name in own else ()
            if len(shape) > 2 and shape[-1] == tensor.shape[1] and shape.numel() == tensor.numel():
                tensor = tensor.reshape(shape)
        found[name] = tensor
    return found
