"""RMSNorm (arXiv 1910.07467), alone or with a gate."""

import torch
import torch.nn.functional as F

from fusedlm.nn.module import Constant, Module, OpUse, Role
from fusedlm.nn.pending import PendingMix, PendingNorm
from fusedlm.ops import gated_rmsnorm


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 or better, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        weight = weight.to(wide.dtype)
    return F.rms_norm(wide, (x.shape[-1],), weight, eps).to(x.dtype)


class RMSNorm(Module):
    """A learnt gain per dimension that starts at one; without gain it is one.

    Attributes:
        scale: a constant factor of the output, a number or a tensor (); None: 1.
    """

    def __init__(self, dim: int, eps: float, scale: float | None = None, *, has_gain: bool = True):
        super().__init__()
        self.dim, self.eps = dim, eps
        if has_gain:
            self.add_parameter("weight", (dim,), Role("gain"), Constant(1.0))
        else:
            self.weight = None
        if scale is None:
            self.scale = None
        else:
            self.add_constant("scale", scale)

    def forward(
        self, x: torch.Tensor | PendingMix, *, pending: bool = False
    ) -> torch.Tensor | PendingNorm | tuple[torch.Tensor, torch.Tensor]:
        """pending: leave the norm to the next projection, which must support it (`fuses_norm`). Of a pending mix, the
        mixed tensor and its norm."""
        gain = self.weight
        if gain is None:  # kernels take one
            like = x.x if isinstance(x, PendingMix) else x
            gain = like.new_ones(self.dim, dtype=torch.promote_types(like.dtype, torch.float32))
        gain = gain if self.scale is None else gain * self.scale
        if isinstance(x, PendingMix):
            return x.norm(gain, self.eps, self.backend("mix_inputs"))
        return PendingNorm(x, gain, self.eps) if pending else rms_norm(x, self.eps, gain)


class GatedRMSNorm(Module):
    """RMSNorm of each group of a token, times silu(z), with a learnt gain that starts at one. With gate_first the gate
    is applied before the norm."""

    def __init__(self, width: int, eps: float, *, n_groups: int = 1, gate_first: bool = False):
        """width: of a group. n_groups: groups that have a gain of their own; 1: all have the same."""
        super().__init__()
        self.add_parameter("weight", (n_groups * width,), Role("gain"), Constant(1.0))
        self.width, self.eps, self.gate_first = width, eps, gate_first

    def forward(
        self,
        y: torch.Tensor,
        z: torch.Tensor,
        x: torch.Tensor | None = None,
        skip_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y, z, x: (B, T, ...), the same number of elements per token. skip_H: with it y + skip x takes the place of y,
        one factor for each of H equal parts of a token. Returns (B, T, elements)."""
        y, z, x = (None if a is None else a.flatten(2).unflatten(2, (-1, self.width)) for a in (y, z, x))
        gain = self.weight if len(self.weight) == self.width else self.weight.unflatten(0, (-1, self.width))
        backend = self.backend("gated_rmsnorm")
        out = gated_rmsnorm(
            y, z, gain, x_BTGW=x, skip_H=skip_H, gate_first=self.gate_first, eps=self.eps, backend=backend
        )
        return out.flatten(2)

    def op(self) -> OpUse:
        return OpUse("gated_rmsnorm", "gated_rmsnorm", {"width": self.width})
