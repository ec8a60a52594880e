"""Optimizers from a recipe. The functions here take any `torch.optim.Optimizer`."""

import torch
from torch import nn

from fusedlm.config.train import AdamWConfig, OptimizerConfig, SGDConfig
from fusedlm.nn.module import parameters_by_kind
from fusedlm.optim.mup import factored_groups

DECAYED_KINDS = ("matrix", "router")  # roles with weight decay
_FUSED_DEVICES = ("cpu", "cuda")


def parameter_groups(model: nn.Module, weight_decay: float, head_lr: float | None = None) -> list[dict]:
    """The trainable parameters in two groups by role: with weight decay and without. A shared parameter counts once.
    With head_lr an untied head is a group of its own, with this learning rate.

    Weight decay applies to hidden matrices and routers. It does not apply to embeddings and heads (tied or not), norms,
    biases, convolutions, per-head vectors, and the lambdas of differential mixers. Empty groups are omitted.

    Raises:
        ValueError: a parameter has no role.
    """
    decayed, kept, head = [], [], []
    for _, kind, parameter in parameters_by_kind(model):
        if parameter.requires_grad:
            own = kind == "head" and head_lr is not None
            (decayed if kind in DECAYED_KINDS else head if own else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups.append({"params": head, "weight_decay": 0.0, "lr": head_lr})
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a recipe, with parameter groups by role, and under `model.mup` by their factors.

    Raises:
        ValueError: `model.mup` has no rule for this optimizer.
    """
    if getattr(model, "mup", None) is not None and isinstance(config, SGDConfig):
        raise ValueError("train.optimizer.type=sgd: model.mup has no rule for it; use adamw, or remove model.mup")
    groups = factored_groups(model, parameter_groups(model, config.weight_decay, config.head_lr), config.lr)
    return _BUILDERS[config.type](groups, config, device)


def _adamw(groups: list[dict], config: AdamWConfig, device: torch.device) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    fused = device.type in _FUSED_DEVICES
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def _sgd(groups: list[dict], config: SGDConfig, device: torch.device) -> torch.optim.Optimizer:
    # Not fused: torch's fused kernel leaves the momentum uninitialised if the first step is skipped.
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


_BUILDERS = {"adamw": _adamw, "sgd": _sgd}


def optimizer_bytes(config: OptimizerConfig, n_parameters: int) -> int:
    """Bytes of optimizer state for `n_parameters` float32 parameters, without step counters."""
    if isinstance(config, AdamWConfig):
        return 2 * 4 * n_parameters
    return 4 * n_parameters if config.momentum else 0


def set_learning_rates(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set each group's learning rate to `scale` times its `peak_lr`, which is the rate it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * scale


def step_if(optimizer: torch.optim.Optimizer, condition: torch.Tensor) -> None:
    """Take a step if the condition, a () bool tensor, is true. If not, parameters and state are unchanged.

    Fused optimizers of torch read the condition on the device, by the attributes that torch's gradient scaler sets; for
    other optimizers the host waits for it.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if bool(condition):
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, (~condition).float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
