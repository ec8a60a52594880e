"""quantization.json of a checkpoint: the layers that have codes and scales instead of a weight, and their formats."""

import json
from pathlib import Path

import torch

from fusedlm.nn.quantized import empty_weight, hidden_matrices, quantized_layers, replace_layers
from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint
from fusedlm.runs.state import QUANTIZATION

_VERSION = 1


def is_quantized(checkpoints: Checkpoints, step: int) -> bool:
    """Whether a checkpoint, whose manifest is intact, has quantised layers."""
    return QUANTIZATION in checkpoints.files(step)


def describe(model: torch.nn.Module) -> str:
    """The text of quantization.json of a model with quantised layers."""
    layers = {name: {"format": layer.format, "group": layer.group} for name, layer in quantized_layers(model).items()}
    return json.dumps({"version": _VERSION, "layers": layers}, indent=1) + "\n"


def read_quantization(checkpoints: Checkpoints, step: int) -> dict | None:
    """The content of a verified quantization.json; None: the checkpoint has none."""
    return checkpoints.read_json(step, QUANTIZATION) if is_quantized(checkpoints, step) else None


def allocate_layers(model: torch.nn.Module, record: dict, source: Path) -> None:
    """Replace the layers of a model that a record names; loading fills them.

    Args:
        source: names the record in errors.

    Raises:
        DamagedCheckpoint: a layer or format is not one of this model.
    """
    if record.get("version") != _VERSION:
        raise ValueError(
            f"{source}: version {record.get('version')!r}, this one reads {_VERSION}; quantise the run again"
        )
    known, weights = hidden_matrices(model), {}
    try:
        for name, kept in dict(record["layers"]).items():
            if name not in known:
                raise ValueError(f"layer {name!r} is no hidden matrix of the model")
            format, group = kept["format"], kept["group"]
            weights[name] = empty_weight(known[name], format, group if format == "int4" else None)
            if weights[name].group != group:
                raise ValueError(f"layer {name!r}: {format} has no groups of {group!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{source}: {error if isinstance(error, ValueError) else 'not what was written'}"
        ) from None
    replace_layers(model, weights)
