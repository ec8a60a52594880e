"""Linear layers and routed experts whose weights stay in few bits, for evaluation and decoding."""

from collections.abc import Mapping

import torch

from fusedlm.nn.ffn.experts import Experts
from fusedlm.nn.linear import Linear, product, product_dtype
from fusedlm.nn.module import Module
from fusedlm.ops import QuantizedWeight, dequantize_weight, quantized_experts, quantized_linear
from fusedlm.ops.quantized.reference import group_of, layout


class _Stored(torch.nn.Module):
    """A `QuantizedWeight` as the buffers `codes` and `scales`, which move with the module and keep their dtypes, those
    of the format."""

    def store(self, weight: QuantizedWeight) -> None:
        self.width, self.format, self.group = weight.width, weight.format, weight.group
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)

    def quantized_weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.scales, self.width, self.format, self.group)

    def _apply(self, fn, recurse=True):
        for name in ("codes", "scales"):
            tensor, moved = self._buffers[name], fn(self._buffers[name])
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        group = f", group={self.group}" if self.group else ""
        return f"{self.width}, {len(self.codes)}, {self.format}{group}"


class QuantizedLinear(_Stored, Linear):
    """In place of a `Linear`: the same products with the values of a `QuantizedWeight`, whose codes and scales are
    buffers. It has no parameter, and gives gradients to its input alone.

    The product with all rows or those of a split is `quantized_linear`. Grouped and transposed products, by which
    latent attention absorbs a projection in decoding, need the values; these are decoded once and kept.
    """

    fuses = False  # the ops that fuse a norm or an activation read weights of floats

    def __init__(self, layer: Linear, weight: QuantizedWeight):
        torch.nn.Module.__init__(self)
        shape = (layer.out_features, layer.in_features)
        if (len(weight.codes), weight.width) != shape:
            raise ValueError(f"weight of shape {(len(weight.codes), weight.width)} does not fit a layer of {shape}")
        self.in_features, self.out_features, self.splits = layer.in_features, layer.out_features, layer.splits
        self.backends, self.training = layer.backends, layer.training
        self.store(weight)
        # By split and dtype: which codes and scales were decoded, these, and their values.
        self._decoded: dict[tuple[str | None, torch.dtype], tuple] = {}
        self.register_parameter("bias", None)

    def forward(self, x, *, part=None, groups=None, transposed=False, dtype=None):
        """As `Linear.forward`, of a layer that takes and returns nothing that is pending."""
        x = x.to(dtype or product_dtype(x))
        if groups is not None or transposed:
            return product(x, self._values(part, x.dtype), groups, transposed)
        return quantized_linear(x, self.quantized_weight(part), backend=self.backend("quantized_linear"))

    def _values(self, part: str | None, dtype: torch.dtype) -> torch.Tensor:
        weight = self.quantized_weight(part)
        if torch.compiler.is_compiling():  # where nothing can be kept between two calls
            return dequantize_weight(weight, dtype)
        versions = self.codes._version, self.scales._version
        known = self._decoded.get((part, dtype))
        # These are kept, so that no others can have their ids.
        if known is None or known[:3] != (id(self.codes), id(self.scales), versions):
            kept = self.codes, self.scales
            known = (*map(id, kept), versions, kept, dequantize_weight(weight, dtype))
            self._decoded[part, dtype] = known
        return known[-1]

    def quantized_weight(self, part: str | None = None) -> QuantizedWeight:
        """The rows of a split, or all."""
        weight = super().quantized_weight()
        if part is None:
            return weight
        names = list(self.splits)
        start = sum(self.splits[name] for name in names[: names.index(part)])
        return weight.rows(start, self.splits[part])

    def weight_of(self, part: str | None = None) -> torch.Tensor:
        """The values of the rows of a split, or all, in float32."""
        return dequantize_weight(self.quantized_weight(part))

    def _apply(self, fn, recurse=True):
        self._decoded.clear()
        return super()._apply(fn, recurse)


class QuantizedStack(_Stored):
    """One of the stacks of `QuantizedExperts`: the rows of all experts, one after the other."""

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.store(weight)


class QuantizedExperts(Experts):
    """In place of `Experts`: the same feed-forward with the values of two `QuantizedStack`s. It has no parameter, and
    gives gradients to its input and to the weights of the outputs alone."""

    op = "quantized_experts"

    def __init__(self, experts: Experts, up: QuantizedWeight, down: QuantizedWeight):
        """up, down: of the rows of all experts, one after the other."""
        Module.__init__(self)
        for name, weight in (("up", up), ("down", down)):
            n_experts, rows, width = getattr(experts, name).shape
            found, shape = (len(weight.codes), weight.width), (n_experts * rows, width)
            if found != shape:
                raise ValueError(f"{name} of shape {found} does not fit {n_experts} experts of {shape} in all")
        self.activation, self.slope, self.n_experts = experts.activation, experts.slope, n_experts
        self.backends, self.training = experts.backends, experts.training
        self.up, self.down = QuantizedStack(up), QuantizedStack(down)

    def forward(self, x_ND: torch.Tensor, indices_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """As `Experts.forward`."""
        return quantized_experts(
            x_ND.to(product_dtype(x_ND)),
            self.up.quantized_weight(),
            self.down.quantized_weight(),
            indices_NK,
            weights_NK,
            activation=self.activation,
            slope=self.slope,
            backend=self.backend(self.op),
        )

    def flops(self, n_slots: int) -> int:
        """Of so many pairs of a token and an expert."""
        return 2 * n_slots * sum(len(s.codes) * s.width for s in (self.up, self.down)) // self.n_experts

    def parameters_of_one(self) -> int:
        """0: codes and scales are buffers."""
        return 0

    def saved_elements(self) -> int:
        """As of the values in floats."""
        return len(self.up.codes) // self.n_experts


def hidden_matrices(model: torch.nn.Module) -> dict[str, Linear]:
    """The linear layers of a model that can be quantised, by name: those whose weight has the role of a hidden matrix.
    Not among them are embeddings, heads and routers, and stacks of experts, which are no linear layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is Linear and module.__dict__["_declared"]["weight"][0].kind == "matrix"
    }


def hidden_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of a model that `replace_layers` can replace: of its hidden matrices (N, K) by the name of their
    layer, and its stacks of experts (E, N, K) by their own, such as blocks.0.ffn.experts.up."""
    found = {name: layer.weight for name, layer in hidden_matrices(model).items()}
    for name, module in model.named_modules():
        if type(module) is Experts:
            found |= {f"{name}.up": module.up, f"{name}.down": module.down}
    return found


def replace_layers(model: torch.nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Put a `QuantizedLinear` in the place of each layer that is named, and `QuantizedExperts` in that of experts.

    Args:
        weights: by the names of `hidden_weights`; a stack has the rows of all experts, one after the other.

    Raises:
        ValueError: a weight does not fit, or only one of the two stacks of some experts is named.
    """
    stacks: dict[str, dict[str, QuantizedWeight]] = {}
    for name, weight in weights.items():
        parent, _, child = name.rpartition(".")
        if type(model.get_submodule(parent)) is Experts:
            stacks.setdefault(parent, {})[child] = weight
        else:
            _put(model, name, QuantizedLinear(model.get_submodule(name), weight))
    for name, own in stacks.items():
        if own.keys() != {"up", "down"}:
            raise ValueError(f"{name}: only {next(iter(own))} is quantised; the experts need both up and down")
        _put(model, name, QuantizedExperts(model.get_submodule(name), **own))


@torch.no_grad()
def decode_layers(model: torch.nn.Module) -> None:
    """Put layers and experts with the values of their codes, in float32, in the place of the quantised ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = Linear(module.in_features, module.out_features, splits=module.splits)
            codes, values = module.codes, {plain.weight: module.weight_of()}
        elif isinstance(module, QuantizedExperts):
            sizes = {"dim": module.up.width, "hidden": module.down.width, "n_experts": module.n_experts}
            plain = Experts(**sizes, activation=module.activation, slope=module.slope)
            codes = module.up.codes
            stacks = {plain.up: module.up, plain.down: module.down}
            values = {p: dequantize_weight(stack.quantized_weight()) for p, stack in stacks.items()}
        else:
            continue
        for parameter, value in values.items():
            parameter.copy_(value.view_as(parameter))
        plain.backends, plain.training = module.backends, module.training
        _put(model, name, plain.to(codes.device))


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def empty_weight(weight: torch.Tensor, format: str, group: int | None) -> QuantizedWeight:
    """An allocated weight for one of `hidden_weights`, on its device. Raises ValueError as `quantize_weight`."""
    group, width = group_of(format, group), weight.shape[-1]
    codes, scales = (
        torch.empty(shape, dtype=dtype, device=weight.device)
        for shape, dtype in layout(weight.shape[:-1].numel(), width, format, group)
    )
    return QuantizedWeight(codes, scales, width, format, group)


def quantized_layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised linear layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantized_weights(model: torch.nn.Module) -> dict[str, QuantizedWeight]:
    """What a model has in few bits: of linear layers and of stacks of experts, by the names of `hidden_weights`."""
    return {name: module.quantized_weight() for name, module in model.named_modules() if isinstance(module, _Stored)}
