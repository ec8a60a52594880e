"""Optimizer state as a flat table of named tensors, the form in which checkpoints hold it."""

import torch
from torch import nn


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State tensors under `<state key>/<parameter name>`, such as `exp_avg/blocks.0.ffn.up.weight`.

    Raises:
        TypeError: the optimizer keeps state that is not a tensor.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"optimizer state {key} of {name} is a {type(value).__name__}, not a tensor")
            tensors[f"{key}/{name}"] = value
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave; hyperparameters stay those the optimizer was built with.

    Raises:
        ValueError: a tensor belongs to no parameter of this optimizer, or its shape is not the parameter's.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {id(parameter): index for index, parameter in enumerate(trained)}
    by_name = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in index_of}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in by_name:
            raise ValueError(f"optimizer state {full_name!r} belongs to no trained parameter of this model")
        parameter = by_name[name]
        if tensor.ndim and tensor.shape != parameter.shape:
            raise ValueError(
                f"optimizer state {full_name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}"
            )
        state.setdefault(index_of[id(parameter)], {})[key] = tensor
    # torch's own loading puts each tensor on the device, and in the precision, that the fused kernels expect.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
