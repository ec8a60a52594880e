"""All that a checkpoint holds: collected from the live objects, and put back into them."""

import json
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from fusedlm.config import Recipe, dump_recipe
from fusedlm.optim import ExponentialMovingAverage, load_optimizer_tensors, optimizer_tensors
from fusedlm.train.checkpoint import Checkpoints

MODEL, OPTIMIZER, EMA, RNG, STATE, RECIPE = "model", "optimizer", "ema", "rng", "state.json", "recipe.yaml"


@dataclass
class Progress:
    """How far a run is: the content of state.json."""

    data: str  # fingerprint of the prepared text
    step: int = 0  # optimizer steps behind us, skipped ones included
    next_sample: int = 0  # the loader's position: global samples read
    skipped: int = 0  # steps skipped as loss or gradient norm was not finite
    skipped_in_row: int = 0  # of these, the ones that the run ended in so far
    ema_updates: int = 0
    validated_step: int = 0  # step of the last validation; 0: none yet
    val_bpb: float | None = None  # its bits per byte
    best_step: int | None = None  # of the checkpoint with the lowest validation bits per byte
    best_val_bpb: float | None = None


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name: the live tensors, a shared one once under its first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copy saved tensors into the model.

    Raises:
        ValueError: names or shapes are not those of this model; `source` says where they came from.
    """
    own = model_tensors(model)
    if tensors.keys() != own.keys():
        name = sorted(tensors.keys() ^ own.keys())[0]
        raise ValueError(f"{source}: tensor {name!r} is in only one of the checkpoint and the model of its recipe")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            saved, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
            raise ValueError(f"{source}: {name!r} has shape {saved}, the model {wanted}")
        tensor.copy_(tensors[name])


def save_state(
    checkpoints: Checkpoints,
    progress: Progress,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ExponentialMovingAverage | None,
    device: torch.device,
) -> None:
    """Write the checkpoint of `progress.step`. Raises OSError when the disk does not take it."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    tensors = {MODEL: model_tensors(model), OPTIMIZER: optimizer_tensors(model, optimizer), RNG: rng}
    if ema is not None:
        tensors[EMA] = ema.state_dict()
    texts = {STATE: json.dumps(asdict(progress), indent=2) + "\n", RECIPE: dump_recipe(recipe)}
    checkpoints.save(progress.step, tensors, texts)


def restore_state(
    checkpoints: Checkpoints,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ExponentialMovingAverage | None,
    device: torch.device,
) -> Progress:
    """Put a verified checkpoint back. The RNG of a CUDA device is restored where the run was on one before, too."""
    progress = read_progress(checkpoints, step)
    load_model_tensors(model, checkpoints.read_tensors(step, MODEL), str(checkpoints.path(step)))
    load_optimizer_tensors(model, optimizer, checkpoints.read_tensors(step, OPTIMIZER))
    if ema is not None:
        ema.load_state_dict(checkpoints.read_tensors(step, EMA), progress.ema_updates)
    rng = checkpoints.read_tensors(step, RNG)
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)
    return progress


def read_progress(checkpoints: Checkpoints, step: int) -> Progress:
    """state.json of a verified checkpoint.

    Raises:
        ValueError: it was written by a version whose state has other fields.
    """
    saved = checkpoints.read_json(step, STATE)
    known = {field.name for field in fields(Progress)}
    if saved.keys() != known:
        name = sorted(saved.keys() ^ known)[0]
        raise ValueError(f"{checkpoints.path(step) / STATE}: field {name!r} is not as this version writes it")
    return Progress(**saved)
