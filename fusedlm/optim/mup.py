"""Parameter groups under maximal update parametrisation (`fusedlm.nn.mup`)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fusedlm.nn.mup import MuP


class Factors(NamedTuple):
    """Of the learning rate and the weight decay of a parameter."""

    rate: float
    decay: float


def adam_factors(mup: MuP, name: str) -> Factors:
    """Of a parameter under Adam, whose update has elements of size 1 whatever the gradient."""
    return Factors(mup.adam_rate(name), mup.adam_decay(name))


def orthogonal_factors(mup: MuP, name: str, scaling: str) -> Factors:
    """Of a matrix whose update is orthogonalised; raises as `MuP.orthogonal_rate`."""
    return Factors(mup.orthogonal_rate(name, scaling), 1.0)


def factored_groups(
    model: nn.Module, groups: list[dict], lr: float, factors: Callable[[MuP, str], Factors] = adam_factors
) -> list[dict]:
    """Parameter groups of a model, divided into those with equal factors, with `lr` and `weight_decay` multiplied.

    Groups whose factors are all 1 stay as they are, which is every group of a model in standard parametrisation or at
    base width.

    Args:
        groups: with `params` and `weight_decay`, perhaps with an `lr`, and lists that go with `params`, `names` and
            `roles`.
        lr: of groups without.
    """
    mup = getattr(model, "mup", None)
    if mup is None:
        return groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    divided = []
    for group in groups:
        by_factors: dict[Factors, list[int]] = {}
        for index, parameter in enumerate(group["params"]):
            by_factors.setdefault(factors(mup, names[id(parameter)]), []).append(index)
        for (rate, decay), members in by_factors.items():
            changes = {key: [group[key][i] for i in members] for key in ("params", "names", "roles") if key in group}
            changes["weight_decay"] = group["weight_decay"] * decay
            if rate != 1.0:
                changes["lr"] = group.get("lr", lr) * rate
            divided.append(group | changes)
    return divided
