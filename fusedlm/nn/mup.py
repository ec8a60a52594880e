"""Maximal update parametrisation: what the width of a model changes in its forward pass and its rates.

A model is compared, parameter by parameter, with the same model at base width. What has the same size in both does not
grow with the width: ranks of latents, grouped keys and values, the classes of a router, taps of a convolution.

The conditions are those of arXiv 2310.17813: a matrix and its update have the spectral norm sqrt(fan_out / fan_in), up
to a factor that does not depend on the width. That of Adam's update of a matrix is about rate * sqrt(fan_in * fan_out),
so its rate is divided by the growth of fan_in. For what is as wide as the model on both sides these are the rules of
Tensor Programs V (arXiv 2203.03466, table 8). docs/mup.md has the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fusedlm.nn.module import Module, Role, roles

# Kinds whose rate does not depend on the width: each element has a gradient of its own, and no sum over the width is
# between it and what it changes. The head is one of them because the logits are divided by the growth of the width.
_VECTORS = ("embedding", "head", "gain", "bias", "per_head", "convolution", "gate")


@dataclass(frozen=True)
class Growth:
    """A parameter over the same one at base width.

    fan_in: the growth of what its products sum over; 1.0 where there is no sum or it does not grow.
    in_block: whether it belongs to a residual branch.
    """

    kind: str
    fan_in: float
    in_block: bool


@dataclass(frozen=True)
class MuP:
    """The growth of every parameter by name, and of the depth.

    depth: blocks over those at base depth; 1.0 without depth scaling.
    depth_exponent: residual branches are multiplied by depth ** -depth_exponent.
    """

    growth: Mapping[str, Growth]
    depth: float = 1.0
    depth_exponent: float = 1.0

    def branch_scale(self) -> float:
        """Factor of every residual branch (CompleteP, arXiv 2505.01618, table 1)."""
        return self.depth**-self.depth_exponent

    def adam_rate(self, name: str) -> float:
        """Factor of the learning rate of a parameter under Adam."""
        return self._depth_rate(name) / self.growth[name].fan_in

    def adam_decay(self, name: str) -> float:
        """Factor of its weight decay, which multiplies the learning rate: their product does not depend on width."""
        return self.growth[name].fan_in

    def orthogonal_rate(self, name: str, scaling: str) -> float:
        """Factor of the learning rate of a matrix whose update is orthogonalised. With `scaling` "spectral" its
        spectral norm is sqrt(fan_out / fan_in) at every width, and no rule is needed.

        Raises:
            ValueError: the scaling is another; packed matrices would need a factor for each split.
        """
        if scaling != "spectral":
            raise ValueError(
                f"scaling={scaling}: model.mup goes with scaling=spectral alone; set it, or remove model.mup"
            )
        return self._depth_rate(name)

    def _depth_rate(self, name: str) -> float:
        return self.depth ** (self.depth_exponent - 1) if self.growth[name].in_block else 1.0


def widen(model: Module, base: Module, blocks: list[Module], *, depth: float = 1.0, depth_exponent: float = 1.0) -> MuP:
    """Give a model the scales of the maximal update parametrisation. At base width nothing changes.

    Every module with `widen_from` sets its own. Matrices start with the variance 1 / fan_in anyway, which is the rule.

    Args:
        base: the same model at base width; the meta device will do.
        blocks: the residual blocks of the model.
        depth, depth_exponent: as `MuP` has them.

    Raises:
        ValueError: the two models have other parameters.
    """
    own, other = roles(model), roles(base)
    if own.keys() != other.keys():
        name = sorted(own.keys() ^ other.keys())[0]
        raise ValueError(f"model.mup: parameter {name} is in only one of the model and the model at base width")
    shapes, base_shapes = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, base))
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    growth = {}
    for name, parameter in model.named_parameters():
        if own[name].kind != other[name].kind or len(own[name].splits) != len(other[name].splits):
            raise ValueError(f"model.mup: parameter {name} is another at base width; give it blocks of the same types")
        fan_in = _growth(own[name], other[name], shapes[name], base_shapes[name])
        growth[name] = Growth(own[name].kind, fan_in, id(parameter) in inside)
    base_modules = dict(base.named_modules())
    for prefix, module in model.named_modules():
        if hasattr(module, "widen_from"):
            module.widen_from(base_modules[prefix])
    return MuP(growth, depth, depth_exponent)


def _growth(role: Role, base: Role, shape: tuple[int, ...], base_shape: tuple[int, ...]) -> float:
    """Of what products with the parameter sum over."""
    if role.kind in ("matrix", "router"):
        return role.fan_in / base.fan_in
    if role.kind == "lambda":  # vectors whose products are summed over their last dimension; one per head is no vector
        return shape[-1] / base_shape[-1] if len(shape) > 1 else 1.0
    if role.kind not in _VECTORS:
        raise ValueError(f"model.mup: parameters of kind {role.kind!r} have no rule for width")
    return 1.0
