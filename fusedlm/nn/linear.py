"""The bias-free projection that every layer is made of. It owns its weight: every product with it is a call."""

import math

import torch
import torch.nn.functional as F

from fusedlm.nn.module import Constant, Init, Module, Normal, OpUse, Orthogonal, Role
from fusedlm.nn.pending import PendingActivation, PendingInput, PendingNorm, PendingProduct, fuses_token
from fusedlm.ops import float32_linear
from fusedlm.ops.common import runs_fused


class Linear(Module, torch.nn.Linear):
    """y = x W^T, and the other products with W that mixers need, all through `forward`.

    A layer that stores W in another way (quantised, sharded) overrides `weight_of`, or all of `forward`, and sets
    `fuses` to False where it takes no pending input.
    """

    fuses = True  # whether `forward` takes pending inputs
    ends_branch = False  # whether the output is added to the residual stream: then it may be a PendingProduct

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        splits: dict[str, int] | None = None,
        zero: bool = False,
        kind: str = "matrix",
        init: Init | None = None,
    ):
        """splits: rows of the packed projection by name, in order; None: it is one. zero: W starts at zero, as of
        projections that write into the residual stream, so that every block starts as the identity. init: None:
        N(0, 1 / in_features)."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.splits = {name: rows for name, rows in (splits or {}).items() if rows}
        if self.splits and sum(self.splits.values()) != out_features:
            raise ValueError(f"splits {self.splits} do not sum to out_features={out_features}")
        if init is None:
            init = Constant(0.0) if zero else Normal(1 / math.sqrt(in_features))
        role = Role(kind, in_features, out_features, tuple(self.splits.items()))
        self.add_parameter("weight", (out_features, in_features), role, init)
        self.register_parameter("bias", None)

    def forward(
        self,
        x: torch.Tensor | PendingNorm | PendingActivation | PendingInput,
        *,
        part: str | None = None,
        groups: int | None = None,
        transposed: bool = False,
        then=None,
        dtype: torch.dtype | None = None,
    ):
        """A product with W.

        Args:
            x: (..., in_features), or a pending output of a norm or projection.
            part: the rows of that split alone; None: all.
            groups: the number of equal groups of W's rows; x (..., groups, I, in_features) has I vectors for each, and
                the output is (..., groups, I, rows / groups).
            transposed: multiply by W instead of W^T: x is (..., rows), or with groups (..., groups, I, rows / groups),
                and the output has in_features in its place. This moves a projection to the other side of a product.
            then: an activation; the layer returns a PendingActivation for the next one.
            dtype: x and W are converted to it; None: as they are, or as autocast has it.
        """
        if isinstance(x, PendingNorm):
            if self.fuses_token(x.x):
                return x.project_token(self.weight_of(), product_dtype(x.x), self.backend("token_linear"))
            return x.project(self.weight_of(), product_dtype(x.x), self.backend("rmsnorm_linear"))
        if isinstance(x, PendingInput):
            return PendingProduct(x.x, self.weight_of(), x.activation, self.backend("token_linear"))
        if isinstance(x, PendingActivation):
            return x.project(self.weight_of(), product_dtype(x.x), self.backend(x.activation.op))
        weight = self.weight_of(part)
        if ends_token(self, x):
            return PendingProduct(x, weight, None, self.backend("token_linear"))
        if dtype == torch.float32 and groups is None and then is None and not transposed and x.ndim > 1:
            return float32_linear(x, weight, backend=self.backend("float32_linear"))
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        if then is not None:
            return PendingActivation(x, weight, then)
        return product(x, weight, groups, transposed)

    def weight_of(self, part: str | None = None) -> torch.Tensor:
        """The rows of a split, or all."""
        if part is None:
            return self.weight
        return self.weight.split(list(self.splits.values()))[list(self.splits).index(part)]

    def fuses_norm(self, x: torch.Tensor) -> bool:
        """Whether the norm of x can be left pending for this layer."""
        if not self.fuses:
            return False
        if self.fuses_token(x):
            return True
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return runs_fused("rmsnorm_linear", self.backend("rmsnorm_linear"), x, dtype=product_dtype(x), **sizes)

    @property
    def casts_input(self) -> bool:
        """Whether this layer casts what a norm or an activation before it computes, and so takes both pending."""
        return False

    def fuses_token(self, x: torch.Tensor) -> bool:
        """Whether x is one token, whose projection is fused with what is before and after it."""
        return self.fuses and fuses_token(x, self.backend("token_linear"), product_dtype(x))

    def init_orthogonal(self) -> None:
        """Start a hidden matrix with the default initialisation as an orthogonal one."""
        role, init = self.__dict__["_declared"]["weight"]
        if role.kind == "matrix" and init == Normal(1 / math.sqrt(self.in_features)):
            self.__dict__["_declared"]["weight"] = (role, Orthogonal(tuple(self.splits.values())))

    def norm_op(self) -> OpUse:
        """The op that `fuses_norm` asks for."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return OpUse("rmsnorm_linear", "rmsnorm_linear", sizes)

    def flops(self, n_tokens: int) -> int:
        """A multiply-add counts two."""
        return 2 * self.in_features * self.out_features * n_tokens


def product(x: torch.Tensor, weight: torch.Tensor, groups: int | None, transposed: bool) -> torch.Tensor:
    """The products that `Linear.forward` describes, with a given weight."""
    if groups is not None:
        weight = weight.unflatten(0, (groups, -1)).to(x.dtype)
        return torch.einsum("...gir,grd->...gid" if transposed else "...gid,grd->...gir", x, weight)
    return x @ weight.to(x.dtype) if transposed else F.linear(x, weight)


def fuses_norm(layer: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether a layer, perhaps a replacement of ours, takes a pending norm of x."""
    return isinstance(layer, Linear) and layer.fuses_norm(x)


def casts_input(layer: torch.nn.Module) -> bool:
    """Whether a layer, perhaps a replacement of ours, takes a pending norm or activation to cast what it computes."""
    return isinstance(layer, Linear) and layer.casts_input


def mlp(x: torch.Tensor | PendingNorm, up: torch.nn.Module, down: torch.nn.Module, activation):
    """down(activation(up(x))), as one op where a fused backend runs and both layers support it. A PendingProduct if
    `down` ends a branch and x is one token."""
    if casts_input(down) or ends_token(down, x.x if isinstance(x, PendingNorm) else x):
        return down(PendingInput(up(x), activation))
    if isinstance(x, PendingNorm):
        return down(activation(up(x)))
    if isinstance(up, Linear) and isinstance(down, Linear) and up.fuses and down.fuses:
        sizes = activation.sizes(up.in_features, down.in_features)
        if runs_fused(activation.op, down.backend(activation.op), x, dtype=product_dtype(x), **sizes):
            return down(up(x, then=activation))
    return down(activation(up(x)))


def ends_token(layer: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether a layer, perhaps a replacement of ours, returns a PendingProduct for the residual stream."""
    return isinstance(layer, Linear) and layer.ends_branch and layer.fuses_token(x)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype if it is on, else that of x: autocast does not know our operators."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
