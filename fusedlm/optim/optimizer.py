"""Optimizers from a recipe. The functions here take any `torch.optim.Optimizer`."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fusedlm.config.train import AdamWConfig, MuonAdamWConfig, NorMuonAdamWConfig, OptimizerConfig, SGDConfig
from fusedlm.nn.module import KINDS, Role, parameters_by_kind, roles
from fusedlm.optim.cautious_adamw import CautiousAdamW
from fusedlm.optim.muon import MuonAdamW
from fusedlm.optim.mup import factored_groups, orthogonal_factors

DECAYED_KINDS = ("matrix", "router")  # roles with weight decay
MATRIX_KINDS = ("matrix",)  # roles that Muon updates
REST_KINDS = tuple(kind for kind in KINDS if kind not in MATRIX_KINDS)
_FUSED_DEVICES = ("cpu", "cuda")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    head_lr: float | None = None,
    kinds: tuple[str, ...] = tuple(KINDS),
) -> list[dict]:
    """The trainable parameters in two groups by role: with weight decay and without. A shared parameter counts once.
    With head_lr an untied head is a group of its own, with this learning rate.

    Weight decay applies to hidden matrices and routers. It does not apply to embeddings and heads (tied or not), norms,
    biases, convolutions, per-head vectors, and the lambdas of differential mixers. Empty groups are omitted.

    Args:
        kinds: the roles of the parameters to group.

    Returns:
        Groups with `label` ("decayed", "not decayed" or "head"), `names` (of parameters, in order), `params` and
        `weight_decay`.

    Raises:
        ValueError: a parameter has no role.
    """
    groups = {"decayed": _group("decayed", weight_decay), "not decayed": _group("not decayed", 0.0)}
    if head_lr is not None:
        groups["head"] = _group("head", 0.0) | {"lr": head_lr}
    for name, kind, parameter in parameters_by_kind(model):
        if parameter.requires_grad and kind in kinds:
            label = "decayed" if kind in DECAYED_KINDS else kind if kind in groups else "not decayed"
            groups[label]["names"].append(name)
            groups[label]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _group(label: str, weight_decay: float) -> dict:
    return {"label": label, "names": [], "params": [], "weight_decay": weight_decay}


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """The optimizer of a recipe, with parameter groups by role, and under `model.mup` by their factors; each has a
    `label` and the `names` of its parameters.

    Args:
        dtype: of activations. Where it is float32, Muon's updates are orthogonalised in float32 on a GPU too.

    Raises:
        ValueError: a parameter has no role, or `model.mup` has no rule for this optimizer.
    """
    if isinstance(config, MuonAdamWConfig | NorMuonAdamWConfig):
        return _muon(model, config, torch.float32 if dtype == torch.float32 else torch.bfloat16)
    return _BUILDERS[config.type](model, config, device)


def _adamw(model: nn.Module, config: AdamWConfig, device: torch.device) -> torch.optim.Optimizer:
    groups = factored_groups(model, parameter_groups(model, config.weight_decay, config.head_lr), config.lr)
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.cautious or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return CautiousAdamW(groups, **options, cautious=config.cautious)
    return torch.optim.AdamW(groups, **options, fused=device.type in _FUSED_DEVICES)


def _sgd(model: nn.Module, config: SGDConfig, device: torch.device) -> torch.optim.Optimizer:
    if getattr(model, "mup", None) is not None:
        raise ValueError("train.optimizer.type=sgd: model.mup has no rule for it; use adamw, or remove model.mup")
    groups = _uniform(parameter_groups(model, config.weight_decay, config.head_lr))
    # Not fused: torch's fused kernel leaves the momentum uninitialised if the first step is skipped.
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def _uniform(groups: list[dict]) -> list[dict]:
    """Groups divided into those of parameters that are not sharded, and of those sharded on one mesh: torch's
    optimizers cannot update others at once."""
    divided = []
    for group in groups:
        meshes = [p.device_mesh if isinstance(p, DTensor) else None for p in group["params"]]
        for mesh in dict.fromkeys(sorted(meshes, key=lambda mesh: 0 if mesh is None else mesh.ndim)):
            members = [i for i, found in enumerate(meshes) if found == mesh]
            lists = {key: [group[key][i] for i in members] for key in ("names", "params")}
            divided.append(group | lists)
    return divided


def _muon(
    model: nn.Module, config: MuonAdamWConfig | NorMuonAdamWConfig, update_dtype: torch.dtype
) -> torch.optim.Optimizer:
    matrix, rest = config.matrix, config.rest
    hidden = _group("muon" if isinstance(config, MuonAdamWConfig) else "normuon", matrix.weight_decay)
    by_name = dict(model.named_parameters())
    for name, role in matrix_roles(model).items():
        hidden["names"].append(name)
        hidden["params"].append(by_name[name])
        hidden.setdefault("roles", []).append(role)
    hidden |= {
        "lr": matrix.lr,
        "momentum": matrix.momentum,
        "nesterov": matrix.nesterov,
        "cautious": matrix.cautious,
        "scheme": matrix.scheme,
        "scaling": matrix.scaling,
        "beta2": matrix.beta2 if isinstance(config, NorMuonAdamWConfig) else None,
    }
    matrices = [hidden] if hidden["params"] else []
    matrices = factored_groups(
        model, matrices, matrix.lr, lambda mup, name: orthogonal_factors(mup, name, matrix.scaling)
    )
    options = {"lr": rest.lr, "betas": (rest.beta1, rest.beta2), "eps": rest.eps, "cautious": rest.cautious}
    others = parameter_groups(model, rest.weight_decay, rest.head_lr, REST_KINDS)
    others = [options | group | {"label": f"adamw, {group['label']}"} for group in others]
    return MuonAdamW([*matrices, *factored_groups(model, others, rest.lr)], update_dtype)


_BUILDERS = {"adamw": _adamw, "sgd": _sgd}


def matrix_roles(model: nn.Module) -> dict[str, Role]:
    """The roles of the parameters that Muon updates, by name."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: role for name, role in roles(model).items() if role.kind in MATRIX_KINDS and name in trainable}


def optimizer_split(optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    """The names of the parameters of each group, by the group's label; groups of other factors have the same one."""
    names: dict[str, list[str]] = {}
    for label, group in _labelled(optimizer):
        names.setdefault(label, []).extend(group.get("names", []))
    return names


def describe_split(optimizer: torch.optim.Optimizer) -> str:
    """How many tensors and parameters each group has, in one line."""
    members: dict[str, list[nn.Parameter]] = {}
    for label, group in _labelled(optimizer):
        members.setdefault(label, []).extend(group["params"])
    return "; ".join(
        f"{label}: {sum(p.numel() for p in parameters):,} parameters in {len(parameters):,} tensors"
        for label, parameters in members.items()
    )


def _labelled(optimizer: torch.optim.Optimizer) -> list[tuple[str, dict]]:
    # An optimizer of a user has no labels.
    return [(group.get("label", f"group {i}"), group) for i, group in enumerate(optimizer.param_groups)]


def optimizer_bytes(config: OptimizerConfig, model: nn.Module) -> int:
    """Bytes of optimizer state for the trainable float32 parameters of a model, without step counters."""
    numbers = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(numbers.values())
    if isinstance(config, AdamWConfig):
        return 2 * 4 * total
    if isinstance(config, SGDConfig):
        return 4 * total if config.momentum else 0
    matrices = matrix_roles(model)
    hidden = sum(numbers[name] for name in matrices)
    by_row = sum(numbers[name] // role.fan_in for name, role in matrices.items())
    return 4 * hidden + 2 * 4 * (total - hidden) + (4 * by_row if isinstance(config, NorMuonAdamWConfig) else 0)


def set_learning_rates(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set each group's learning rate to `scale` times its `peak_lr`, which is the rate it was built with.

    A rate that is a tensor is changed in place, as a captured CUDA graph reads it.
    """
    for group in optimizer.param_groups:
        lr = group["lr"]
        peak = group.setdefault("peak_lr", float(lr) if isinstance(lr, torch.Tensor) else lr)
        if isinstance(lr, torch.Tensor):
            lr.fill_(peak * scale)
        else:
            group["lr"] = peak * scale


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
