"""Optimizer state as a flat table of named tensors, as checkpoints store it."""

import torch
from torch import nn

from fusedlm.distributed import shard_like


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State tensors of any shape and dtype by `<state key>/<parameter name>`, such as `exp_avg/blocks.0.ffn.up.weight`.

    Raises:
        TypeError: the optimizer has state that is neither a tensor nor None.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"optimizer state {key}/{name} is a {type(value).__name__}, not a tensor")
            tensors[f"{key}/{name}"] = value
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore the tensors of `optimizer_tensors`, in their own dtype, on the devices of the parameters, and sharded as
    these are. Hyperparameters are not changed.

    Args:
        tensors: full ones, read one after another.

    Raises:
        ValueError: a tensor belongs to no trainable parameter of this model.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    by_name = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in groups}
    state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in by_name:
            raise ValueError(f"optimizer state {full_name!r} belongs to no trainable parameter of this model")
        parameter = by_name[name]
        group = groups[id(parameter)]
        # torch keeps step counters on the CPU, unless the optimizer is fused or capturable.
        on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
        value = tensor if on_host else shard_like(tensor, parameter)
        state.setdefault(parameter, {})[key] = value.clone() if value is tensor else value
    optimizer.state.clear()
    optimizer.state.update(state)
