"""Outputs that a layer has not computed yet, so that the next layer can compute both steps in one op.

A norm may return its input with its gain, a projection its input with its weight and the activation that follows. Only
layers that can fuse the step get these; every module is still entered by its own `__call__`.

One token, as in decoding, costs the reading of the weights and the launches of kernels. There norms, activations and
the sum with the residual stream are left to the projection before or after them (`token_linear`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fusedlm.ops import mix_inputs, relu2_mlp, rmsnorm_linear, swiglu_mlp, token_linear
from fusedlm.ops.common import runs_fused
from fusedlm.ops.mixing.reference import mix


class PendingMix(NamedTuple):
    """The input of a block, mix_x * (x + skip_weight * skip) + mix_x0 * x0, not computed yet; without what is None."""

    x: torch.Tensor
    mix_x: torch.Tensor | None
    x0: torch.Tensor | None
    mix_x0: torch.Tensor | None
    skip: torch.Tensor | None
    skip_weight: torch.Tensor | None

    def compute(self) -> torch.Tensor:
        return mix(*self).to(self.x.dtype)

    def norm(self, gain: torch.Tensor, eps: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The input and its RMSNorm."""
        return mix_inputs(
            self.x,
            gain,
            mix_x_D=self.mix_x,
            x0=self.x0,
            mix_x0_D=self.mix_x0,
            skip=self.skip,
            skip_weight_D=self.skip_weight,
            eps=eps,
            backend=backend,
        )


class PendingNorm(NamedTuple):
    """RMSNorm of x, not computed yet."""

    x: torch.Tensor
    gain: torch.Tensor
    eps: float

    def project(self, weight: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
        """norm(x) weight^T in dtype."""
        return rmsnorm_linear(self.x, self.gain, weight, eps=self.eps, dtype=dtype, backend=backend)

    def project_token(self, weight: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
        """The same for one token."""
        return token_linear(self.x, weight, gain_D=self.gain, eps=self.eps, dtype=dtype, backend=backend)


@dataclass(frozen=True)
class SquaredReLU:
    """leaky_relu(u, slope)^2."""

    slope: float
    op = "relu2_mlp"

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        return (F.leaky_relu(u, self.slope) if self.slope else F.relu(u)).square()

    def mlp(self, x_ND, weight_in, weight_out, backend: str) -> torch.Tensor:
        return relu2_mlp(x_ND, weight_in, weight_out, slope=self.slope, backend=backend)

    def sizes(self, dim: int, hidden: int) -> dict[str, int]:
        return {"dim": dim, "hidden": hidden}

    def of_token(self) -> dict:
        """Options of `token_linear`."""
        return {"activation": "relu2", "slope": self.slope}


@dataclass(frozen=True)
class SwiGLUActivation:
    """silu(gate) * up of a packed projection, gate first."""

    op = "swiglu_mlp"

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def mlp(self, x_ND, weight_in, weight_out, backend: str) -> torch.Tensor:
        return swiglu_mlp(x_ND, weight_in, weight_out, backend=backend)

    def sizes(self, dim: int, hidden: int) -> dict[str, int]:
        return {}

    def of_token(self) -> dict:
        """Options of `token_linear`."""
        return {"activation": "swiglu"}


class PendingActivation(NamedTuple):
    """activation(x weight^T), not computed yet."""

    x: torch.Tensor
    weight: torch.Tensor
    activation: SquaredReLU | SwiGLUActivation

    def project(self, weight: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
        """activation(x weight_in^T) weight^T in dtype."""
        x_ND = self.x.to(dtype).flatten(0, -2)
        y_ND = self.activation.mlp(x_ND, self.weight, weight, backend)
        return y_ND.view(*self.x.shape[:-1], weight.shape[0])


class PendingInput(NamedTuple):
    """An activation of one token, not computed yet."""

    x: torch.Tensor
    activation: SquaredReLU | SwiGLUActivation


class PendingProduct(NamedTuple):
    """The projection of one token, perhaps after an activation, not computed yet; for the residual stream."""

    x: torch.Tensor
    weight: torch.Tensor
    activation: SquaredReLU | SwiGLUActivation | None
    backend: str

    def compute(self, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """residual + activation(x) weight^T, in dtype; None: that of x."""
        options = {} if self.activation is None else self.activation.of_token()
        return token_linear(self.x, self.weight, **options, residual=residual, dtype=dtype, backend=self.backend)


def is_one_token(x: torch.Tensor) -> bool:
    """Whether x is one token alone, without gradients."""
    return not torch.is_grad_enabled() and x.numel() == x.shape[-1]


def fuses_token(x: torch.Tensor, backend: str, dtype: torch.dtype) -> bool:
    """Whether what is around the projection of x is left to `token_linear`, of that backend and in that dtype."""
    return is_one_token(x) and runs_fused("token_linear", backend, x, dtype=dtype)
