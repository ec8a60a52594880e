"""The linear layer whose three products are computed in 8 bits while it is trained."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

from fusedlm.nn.linear import Linear, product_dtype
from fusedlm.nn.module import OpUse
from fusedlm.nn.pending import PendingInput, PendingNorm
from fusedlm.ops import LowPrecision, isolate_outliers, low_precision_linear, low_precision_weight
from fusedlm.ops.common import runs_fused
from fusedlm.ops.low_precision.formats import Cast
from fusedlm.ops.low_precision.outliers import default_capacity

_CODES = ("codes", "scales", "codes_t", "scales_t")
_COUNTS = ("calls", "found", "isolated")  # of outlier columns, summed over calls


class LowPrecisionLinear(Linear):
    """In place of a `Linear`, with its parameter: products with gradients, in training mode, run in 8 bits.

    Without gradients, and with a part of the weight, in groups or transposed, it is that `Linear`. So validation and
    decoding compute with the weight itself, and checkpoints are those of the plain layer.

    The weight is cast by `cast_weight`, whose codes keep their memory: in every forward pass of the model in training,
    or once per optimizer step by a loop that says so (`cast_by_loop`). A sharded weight is cast when it is gathered
    next (`cast_gathered`): columns have their largest magnitude over the shards of all processes.
    """

    def __init__(self, layer: Linear, precision: LowPrecision, *, outliers: float | None = None, columns=None):
        """outliers: the z-score above which columns of the input are isolated; None: never. columns: the most of them;
        None: one of 64, at least 16."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.splits = layer.in_features, layer.out_features, layer.splits
        self.backends, self.training, self.ends_branch = layer.backends, layer.training, layer.ends_branch
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", None)
        self.__dict__["_declared"] = layer.__dict__["_declared"]
        self.precision, self.outliers = precision, outliers
        self.columns = default_capacity(self.in_features) if columns is None else min(columns, self.in_features)
        for name in _CODES:
            self.register_buffer(name, None, persistent=False)
        counts = None if outliers is None else torch.zeros(len(_COUNTS), device=layer.weight.device)
        self.register_buffer("outlier_counts", counts, persistent=False)
        self.cast_by_loop = False  # whether the training loop calls `cast_weight` after every update
        self.is_stale = False  # whether a sharded weight has changed since it was cast

    @property
    def is_active(self) -> bool:
        """Whether products are computed in 8 bits now."""
        return self.training and torch.is_grad_enabled()

    @property
    def fuses(self) -> bool:
        return not self.is_active

    @property
    def casts_input(self) -> bool:
        if not self.is_active or self.outliers is not None or self.precision.format == "mxfp8":
            return False
        name, _, sizes = self.op()
        return runs_fused(name, self.backend(name), self.weight, dtype=product_dtype(self.weight), **sizes)

    def fuses_norm(self, x: torch.Tensor) -> bool:
        return self.casts_input or super().fuses_norm(x)

    def forward(self, x, *, part=None, groups=None, transposed=False, then=None, dtype=None):
        """As `Linear.forward`."""
        if not self.is_active or part is not None or groups is not None or transposed:
            return super().forward(x, part=part, groups=groups, transposed=transposed, then=then, dtype=dtype)
        options = {}
        if isinstance(x, PendingNorm):
            x, options = x.x, {"gain_K": x.gain, "eps": x.eps}
        elif isinstance(x, PendingInput):
            x, options = x.x, x.activation.of_token()
        if self.codes is None:
            self.cast_weight()
        dtype, extra = dtype or product_dtype(x), None
        if self.outliers is not None:
            x, extra = self._without_outliers(x.to(dtype))
        codes, backend = Cast(*(getattr(self, name) for name in _CODES)), self.backend("low_precision_linear")
        weight = self.weight_of()
        y = low_precision_linear(x, weight, self.precision, codes=codes, dtype=dtype, backend=backend, **options)
        return y if extra is None else y + extra

    def _without_outliers(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x with zeros in the columns of outliers, and their product."""
        x, y, found, isolated = isolate_outliers(x, self.weight_of(), self.outliers, self.columns)
        with torch.no_grad():
            self.outlier_counts.add_(torch.stack([torch.ones_like(found), found, isolated]))
        return x, y

    def op(self) -> OpUse:
        """The op of an active layer."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        sizes["is_integer"] = int(self.precision.grid.is_integer)
        return OpUse("low_precision_linear", "low_precision_linear", sizes)

    @torch.no_grad()
    def cast_weight(self) -> None:
        """Cast the weight as it is now, into the memory of the codes before; where it is sharded, when it is gathered
        next."""
        weight = self.weight
        self.is_stale = isinstance(weight, DTensor)
        if self.is_stale:
            return
        codes = tuple(getattr(self, name) for name in _CODES)
        # Codes move with the module; those of another device are allocated again.
        out = Cast(*codes) if codes[0] is not None and codes[0].device == weight.device else None
        cast = low_precision_weight(weight, self.precision, out=out, backend=self.backend("low_precision_weight"))
        for name, tensor in zip(_CODES, cast, strict=True):
            setattr(self, name, tensor)

    def _apply(self, fn, recurse=True):
        """Codes, scales and counts move with the module and keep their dtypes."""
        kept = {name: self._buffers.pop(name) for name in (*_CODES, "outlier_counts")}
        super()._apply(fn, recurse)
        device = self.weight.device
        for name, tensor in kept.items():
            self._buffers[name] = None if tensor is None else _moved(tensor, device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.precision.format}, scales={self.precision.scales}"


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Counts of a model without memory begin at zero."""
    return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def low_precision_layers(model: torch.nn.Module) -> dict[str, LowPrecisionLinear]:
    """The layers of a model with 8-bit products, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)}


def replace_layers(model: torch.nn.Module, names: Iterable[str], precision: LowPrecision, **options) -> None:
    """Put a `LowPrecisionLinear` in the place of each layer that is named; options: as it takes them."""
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = LowPrecisionLinear(model.get_submodule(name), precision, **options)
        setattr(model.get_submodule(parent), child, layer)
    model.register_forward_pre_hook(_cast_weights)


def _cast_weights(model: torch.nn.Module, _) -> None:
    # The version of a tensor does not tell whether it has changed: fused optimizers do not count it up.
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for layer in low_precision_layers(model).values():
            if not layer.cast_by_loop:
                layer.cast_weight()


def cast_gathered(unit: torch.nn.Module, _) -> None:
    """A hook before the forward pass of a module that FSDP2 gathers, after its own: cast the weights that are due."""
    for layer in low_precision_layers(unit).values():
        if layer.is_stale and not isinstance(layer.weight, DTensor):  # those of units inside are gathered later
            layer.cast_weight()
