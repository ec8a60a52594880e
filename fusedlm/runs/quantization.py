"""quantization.json of a checkpoint: the layers and parameters that have codes and scales instead of a weight.

Linear layers and stacks of experts, `layers`, are computed with their codes. Integer matrices are decoded to parameters
when they are loaded: NAME.codes (N, K) int8 and NAME.scales (N, groups) stand for the parameter NAME, with NAME.left
(N, R) and NAME.right (R, K) the product that is added to it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from fusedlm.nn.quantized import empty_weight, hidden_weights, quantized_layers, quantized_weights, replace_layers
from fusedlm.ops.quantized.integer import BITS, integer_values, largest_code
from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint
from fusedlm.runs.state import QUANTIZATION, model_tensors

_VERSION = 1
_WITH_MATRICES = 2  # earlier readers know no integer matrices, and must refuse
_WITH_EXPERTS = 3  # nor stacks of experts among the layers
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def is_quantized(checkpoints: Checkpoints, step: int) -> bool:
    """Whether a checkpoint, whose manifest is intact, has quantised weights."""
    return QUANTIZATION in checkpoints.files(step)


def describe(model: torch.nn.Module, matrices: Mapping[str, dict] | None = None) -> str:
    """The text of quantization.json of a model with quantised layers or experts.

    Args:
        matrices: bits, group and rank (0: nothing is added) of integer matrices, by the name of the parameter.
    """
    weights = quantized_weights(model)
    layers = {name: {"format": weight.format, "group": weight.group} for name, weight in weights.items()}
    version = _VERSION if weights.keys() == quantized_layers(model).keys() else _WITH_EXPERTS
    record = {"version": version, "layers": layers}
    if matrices:
        record |= {"version": max(version, _WITH_MATRICES), "matrices": dict(matrices)}
    return json.dumps(record, indent=1) + "\n"


def read_quantization(checkpoints: Checkpoints, step: int) -> dict | None:
    """The content of a verified quantization.json; None: the checkpoint has none."""
    return checkpoints.read_json(step, QUANTIZATION) if is_quantized(checkpoints, step) else None


def allocate_layers(model: torch.nn.Module, record: dict, source: Path) -> None:
    """Replace the layers and experts of a model that a record names; loading fills them.

    Args:
        source: names the record in errors.

    Raises:
        DamagedCheckpoint: a layer or format is not one of this model.
    """
    if record.get("version") not in (_VERSION, _WITH_MATRICES, _WITH_EXPERTS):
        raise ValueError(
            f"{source}: version {record.get('version')!r}, this one reads {_VERSION} to {_WITH_EXPERTS}; "
            "quantise the run again"
        )
    known, weights = hidden_weights(model), {}
    try:
        for name, kept in dict(record["layers"]).items():
            if name not in known:
                raise ValueError(f"layer {name!r} is no hidden matrix of the model")
            format, group = kept["format"], kept["group"]
            weights[name] = empty_weight(known[name], format, group if format == "int4" else None)
            if weights[name].group != group:
                raise ValueError(f"layer {name!r}: {format} has no groups of {group!r}")
        replace_layers(model, weights)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{source}: {error if isinstance(error, ValueError) else 'not what was written'}"
        ) from None


def decode_matrices(
    model: torch.nn.Module, record: dict, tensors: Mapping[str, torch.Tensor], source: Path
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with the values of its integer matrices, by the names of their parameters.

    Args:
        model: has these parameters; nothing else of it is read.
        source: names the record in errors.

    Raises:
        DamagedCheckpoint: the record does not describe these tensors, or they are none of this model.
    """
    own, result = model_tensors(model), dict(tensors)
    try:
        for name, kept in dict(record.get("matrices", {})).items():
            if name not in own:
                raise ValueError(f"matrix {name!r} is no parameter of the model")
            result[name] = _decoded(name, kept, result, own[name].shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{source}: {error if isinstance(error, ValueError) else 'not what was written'}"
        ) from None
    return result


def _decoded(name: str, kept: dict, tensors: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """The values of one matrix, whose parts are taken out of the tensors."""
    bits, group, rank = kept["bits"], kept["group"], kept["rank"]
    if bits not in BITS or type(bits) is not int:
        raise ValueError(f"matrix {name!r}: bits={bits!r} must be 2 to 8")
    if group is not None and (type(group) is not int or group < 1):
        raise ValueError(f"matrix {name!r}: group={group!r} must be at least 1")
    codes, scales = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scales")
    n_rows, width = shape.numel() // shape[-1], shape[-1]
    n_groups = 1 if group is None else -(-width // group)
    for what, tensor, expected in (("codes", codes, (n_rows, width)), ("scales", scales, (n_rows, n_groups))):
        if tuple(tensor.shape) != expected:
            raise ValueError(f"tensor '{name}.{what}' has shape {tuple(tensor.shape)}, not {expected}")
    largest = largest_code(bits)
    if codes.dtype != torch.int8 or scales.dtype not in _SCALES:
        raise ValueError(f"matrix {name!r}: codes are {codes.dtype} and scales {scales.dtype}")
    if codes.numel() and (codes.min() < -largest or codes.max() > largest):
        raise ValueError(f"matrix {name!r}: a code is not from {-largest} to {largest}")
    values = integer_values(codes, scales, group)
    if rank:
        left, right = tensors.pop(f"{name}.left"), tensors.pop(f"{name}.right")
        if (tuple(left.shape), tuple(right.shape)) != ((n_rows, rank), (rank, width)):
            raise ValueError(f"matrix {name!r}: the correction is not of rank {rank!r}")
        values = values + left.float() @ right.float()
    return values.view(shape)
