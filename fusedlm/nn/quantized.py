"""The linear layer whose weight stays in few bits, for evaluation and decoding."""

from collections.abc import Mapping

import torch

from fusedlm.nn.linear import Linear, product, product_dtype
from fusedlm.ops import QuantizedWeight, dequantize_weight, quantized_linear
from fusedlm.ops.quantized.reference import group_of, layout


class QuantizedLinear(Linear):
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
        self.format, self.group = weight.format, weight.group
        # By split and dtype: which codes and scales were decoded, these, and their values.
        self._decoded: dict[tuple[str | None, torch.dtype], tuple] = {}
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
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
        weight = QuantizedWeight(self.codes, self.scales, self.in_features, self.format, self.group)
        if part is None:
            return weight
        names = list(self.splits)
        start = sum(self.splits[name] for name in names[: names.index(part)])
        return weight.rows(start, self.splits[part])

    def weight_of(self, part: str | None = None) -> torch.Tensor:
        """The values of the rows of a split, or all, in float32."""
        return dequantize_weight(self.quantized_weight(part))

    def _apply(self, fn, recurse=True):
        """Codes and scales move with the module and keep their dtypes, which are the format's."""
        self._decoded.clear()
        for name in ("codes", "scales"):
            tensor, moved = self._buffers[name], fn(self._buffers[name])
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        group = f", group={self.group}" if self.group else ""
        return f"{self.in_features}, {self.out_features}, {self.format}{group}"


def hidden_matrices(model: torch.nn.Module) -> dict[str, Linear]:
    """The layers of a model that can be quantised, by name: those whose weight has the role of a hidden matrix. Not
    among them are embeddings, heads, routers, and stacks of experts, which are no linear layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is Linear and module.__dict__["_declared"]["weight"][0].kind == "matrix"
    }


def replace_layers(model: torch.nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Put a `QuantizedLinear` in the place of each layer that is named."""
    for name, weight in weights.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(model.get_submodule(name), weight))


def empty_weight(layer: Linear, format: str, group: int | None) -> QuantizedWeight:
    """An allocated weight for a layer, on its device. Raises ValueError as `quantize_weight`."""
    group = group_of(format, group)
    codes, scales = (
        torch.empty(shape, dtype=dtype, device=layer.weight.device)
        for shape, dtype in layout(layer.out_features, layer.in_features, format, group)
    )
    return QuantizedWeight(codes, scales, layer.in_features, format, group)


def quantized_layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
