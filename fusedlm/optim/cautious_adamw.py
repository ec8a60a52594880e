"""AdamW whose weight decay applies only where the update and the weight have the same sign."""

import torch
from torch.optim.adamw import adamw

from fusedlm.distributed import local
from fusedlm.ops.common.device import can_run_triton


@torch.no_grad()
def adamw_step(optimizer: torch.optim.Optimizer, group: dict) -> None:
    """One step of AdamW (arXiv 1711.05101, algorithm 2) on a group with lr, betas, eps, weight_decay and `cautious`.

    State: exp_avg, exp_avg_sq and step, as of torch's AdamW. With `cautious`, weight decay is that of arXiv 2510.12402,
    algorithm 1. Of sharded parameters every process updates its own shard. `grad_scale` and `found_inf` of the
    optimizer are those that torch's fused optimizers read; nothing waits for the device.
    """
    parameters = [p for p in group["params"] if p.grad is not None]
    if not parameters:
        return
    states = [optimizer.state[p] for p in parameters]
    for p, state in zip(parameters, states, strict=True):
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    gradients = [local(p.grad).contiguous() for p in parameters]
    parameters = [local(p) for p in parameters]
    means, squares, steps = ([local(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    beta1, beta2 = group["betas"]
    found_inf = getattr(optimizer, "found_inf", None)
    if not (group["cautious"] and group["weight_decay"]):
        adamw(
            parameters, gradients, means, squares, [], steps, fused=True, found_inf=found_inf, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
        return
    torch._foreach_add_(steps, 1)
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))
    if can_run_triton(parameters[0]):
        from fusedlm.optim.fused_muon import FusedCautiousAdamW

        launchers = vars(optimizer).setdefault("_launchers", {})
        launcher = launchers.setdefault(id(group), FusedCautiousAdamW())
        launcher.step(parameters, gradients, means, squares, steps, group, found_inf)
        return
    for p, g, m, v, step in zip(parameters, gradients, means, squares, steps, strict=True):
        _cautious(p, g, m, v, float(step), group)


def _cautious(p, g, m, v, step: float, group: dict) -> None:
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
    decay = torch.where(m * p >= 0, p, 0.0)
    p.sub_(group["lr"] * (update + group["weight_decay"] * decay))


class CautiousAdamW(torch.optim.Optimizer):
    """AdamW with the weight decay of arXiv 2510.12402: only where update and weight have the same sign.

    Args:
        params: parameters or groups; a group may have its own lr and weight_decay.
        cautious: False: torch's AdamW, for parameters of which some are sharded and some are not.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.1, cautious: bool = True,
    ):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"cautious": cautious, "fused": True})
        self._step_supports_amp_scaling = not cautious or all(
            can_run_triton(p) for group in self.param_groups for p in group["params"]
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            adamw_step(self, group)
