"""Optimizers from a recipe, and which parameters are decayed."""

import torch
from torch import nn

from fusedlm.config.train import OptimizerConfig

_FUSED_DEVICES = ("cpu", "cuda")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters in two groups, decayed and not, each parameter once however many modules share it.

    Embeddings (also as a tied output head), norms, biases and everything else of fewer than two dimensions are not
    decayed. Frozen parameters are left out; an empty group too.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, kept = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), one fused kernel where the device has it. The schedule sets `lr` before each step."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type in _FUSED_DEVICES,
    )


def update_if(optimizer: torch.optim.Optimizer, condition: torch.Tensor) -> None:
    """One step of a fused optimizer where the condition () bool holds, and otherwise parameters, moments and step
    counts as they are. The device decides; the host does not wait for it.

    torch's gradient scaler skips steps by the same two attributes.
    """
    optimizer.grad_scale, optimizer.found_inf = None, (~condition).float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
