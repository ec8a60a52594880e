"""The content of a checkpoint: collected from the live objects, and restored into them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import pydantic
import torch
from torch import nn

from fusedlm.config import Recipe, dump_recipe
from fusedlm.distributed import forget_gathered, local, shard_like
from fusedlm.optim import Averages, load_optimizer_tensors, optimizer_tensors
from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint, ForeignCheckpoint
from fusedlm.runs.writer import CheckpointWriter

MODEL, OPTIMIZER, RNG, STATE, RECIPE = "model", "optimizer", "rng", "state.json", "recipe.yaml"
QUANTIZATION = "quantization.json"  # of checkpoints with quantised layers
EMA, SWA = AVERAGES = ("ema", "swa")  # of files, and of `--weights`


@dataclass
class TrainState:
    """The position of a run: the content of state.json."""

    data: str  # fingerprint of the prepared text
    step: int = 0  # optimizer steps taken, skipped ones included
    next_sample: int = 0  # the loader's position: global samples read
    skipped: int = 0  # steps skipped because loss or gradient norm was not finite
    skipped_in_row: int = 0  # skipped steps since the last one that was not
    ema_updates: int = 0
    swa_updates: int = 0  # missing in checkpoints of earlier versions
    validated_step: int = 0  # step of the last validation; 0: none yet
    val_bpb: float | None = None  # its bits per byte
    best_step: int | None = None  # of the checkpoint with the lowest validation bits per byte
    best_val_bpb: float | None = None
    run: str | None = None  # id of the run; this and the following are None in checkpoints of earlier versions
    tokenizer: str | None = None  # fingerprint
    metrics: str | None = None  # digest of the records up to this step (`fusedlm.runs.metrics`)


_ADDED = {"run", "tokenizer", "metrics", "swa_updates"}
_STATE = pydantic.TypeAdapter(TrainState)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name: the live tensors, a shared tensor once, under its first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def check_model_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises ValueError if names or shapes do not match this model, which may be on the meta device; `source` names the
    checkpoint."""
    own = _named_alike(model, tensors, source)
    for name, tensor in own.items():
        _check_shape(name, tensor, tensors[name], source)


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy saved tensors, full ones, into the model; of sharded parameters each process takes its shard.

    Raises:
        ValueError: names or shapes do not match this model; `source` names the checkpoint.
    """
    for name, tensor in _named_alike(model, tensors, source).items():
        saved = tensors[name]  # once: it may be read from the disk
        _check_shape(name, tensor, saved, source)
        local(tensor).copy_(local(shard_like(saved, tensor)))


def _named_alike(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    own = model_tensors(model)
    if tensors.keys() != own.keys():
        name = sorted(tensors.keys() ^ own.keys())[0]
        raise ValueError(f"{source}: tensor {name!r} is in only one of the checkpoint and the model of the recipe")
    return own


def _check_shape(name: str, tensor: torch.Tensor, saved: torch.Tensor, source: str) -> None:
    if tensor.shape != saved.shape:
        found, wanted = tuple(saved.shape), tuple(tensor.shape)
        raise ValueError(f"{source}: tensor {name!r} has shape {found}, in the model of the recipe {wanted}")


def save_state(
    writer: CheckpointWriter,
    state: TrainState,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Averages,
    device: torch.device,
) -> None:
    """Begin the checkpoint of `state.step`; errors as of `CheckpointWriter.begin`. All processes call this.

    This is where the state of all processes is collected: the tables below hold live tensors, sharded or not.
    `restore_state` is its counterpart.
    """
    forget_gathered(model)
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    tensors = {MODEL: model_tensors(model), OPTIMIZER: optimizer_tensors(model, optimizer), RNG: rng}
    tensors |= {name: average.state_dict() for name, average in averages.kept().items()}
    writer.begin(state.step, tensors, _texts(state, recipe), state.best_step)


def save_weights(
    checkpoints: Checkpoints, state: TrainState, recipe: Recipe, tensors: dict[str, torch.Tensor]
) -> None:
    """Write a checkpoint of weights alone, which can be loaded but not resumed; errors as in `Checkpoints.save`."""
    checkpoints.save(state.step, {MODEL: tensors}, _texts(state, recipe))


def _texts(state: TrainState, recipe: Recipe) -> dict[str, str]:
    return {STATE: json.dumps(asdict(state), indent=2) + "\n", RECIPE: dump_recipe(recipe)}


def restore_state(
    checkpoints: Checkpoints,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Averages,
    device: torch.device,
) -> TrainState:
    """Restore a verified checkpoint into live objects, whatever number of processes wrote it and holds them now: each
    reads every tensor in full, one after another, and keeps its shard. The RNG of the CUDA device is restored if the
    checkpoint was written on one.

    Raises:
        ValueError: a tensor does not fit the model of the recipe, or is missing.
    """
    state = read_state(checkpoints, step)
    load_model_tensors(model, checkpoints.open_tensors(step, MODEL), str(checkpoints.path(step)))
    load_optimizer_tensors(model, optimizer, checkpoints.open_tensors(step, OPTIMIZER))
    for name, average, updates in ((EMA, averages.ema, state.ema_updates), (SWA, averages.swa, state.swa_updates)):
        if average is not None and updates:
            average.load_state_dict(checkpoints.open_tensors(step, name), updates)
    rng = checkpoints.read_tensors(step, RNG)
    try:
        torch.set_rng_state(rng["cpu"])
        if device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], device)
    except (KeyError, RuntimeError, TypeError):
        raise DamagedCheckpoint(f"{checkpoints.path(step) / RNG}.safetensors: no state of random numbers") from None
    return state


def read_state(checkpoints: Checkpoints, step: int) -> TrainState:
    """state.json of a verified checkpoint.

    Raises:
        ForeignCheckpoint: it is the state of another step.
        DamagedCheckpoint: a field has a value that is never written.
        ValueError: it was written by another version, whose state has other fields.
    """
    saved = checkpoints.read_json(step, STATE)
    path = checkpoints.path(step) / STATE
    known = {field.name for field in fields(TrainState)}
    if wrong := (saved.keys() ^ known) - (_ADDED - saved.keys()):
        name = sorted(wrong)[0]
        where = "missing" if name in known else "unknown to this version"
        raise ValueError(f"{path}: field {name!r} is {where}; start a new run with --out")
    try:
        state = _STATE.validate_json(json.dumps(saved), strict=True)
    except pydantic.ValidationError as error:
        (name, *_), value = error.errors()[0]["loc"], error.errors()[0]["input"]
        raise DamagedCheckpoint(f"{path}: {name}={value!r} is never written") from None
    for name, value in saved.items():
        if isinstance(value, int) and value < 0:
            raise DamagedCheckpoint(f"{path}: {name}={value} is never written")
    if state.step != step:
        raise ForeignCheckpoint(f"{checkpoints.path(step)} holds step {state.step}; rename it to its step")
    return state


def examine(
    checkpoints: Checkpoints, step: int, run: str | None = None, only: Sequence[str] | None = None
) -> TrainState:
    """The state of a checkpoint, after checking that its files are intact and that it is of this step and run.

    Args:
        run: id of the run; None: unknown, not checked. Checkpoints of earlier versions have no id, and fit any run.
        only: the tables, by file stem, and the other files to check, those that the checkpoint has; None: all.

    Raises:
        DamagedCheckpoint, ForeignCheckpoint, RemovedCheckpoint, OSError, ValueError: as `Checkpoints.verify` and
            `read_state`.
    """
    files = checkpoints.files(step)
    if only is None:
        checkpoints.verify(step)
    else:
        named = [file for name in only for file in (name, *checkpoints.table_files(step, name)) if file in files]
        checkpoints.verify(step, tuple(named))
    for name in (*checkpoints.table_files(step, MODEL), STATE, RECIPE):
        if name not in files:
            raise DamagedCheckpoint(f"{checkpoints.path(step) / name}: not in the manifest")
    state = read_state(checkpoints, step)
    if run is not None and state.run not in (None, run):
        raise ForeignCheckpoint(f"{checkpoints.path(step)} is of another run ({state.run[:12]}, this is {run[:12]})")
    return state
