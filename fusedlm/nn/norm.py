"""RMSNorm (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F

from fusedlm.nn.module import Constant, Module, Role
from fusedlm.nn.pending import PendingNorm


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 or better, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        weight = weight.to(wide.dtype)
    return F.rms_norm(wide, (x.shape[-1],), weight, eps).to(x.dtype)


class RMSNorm(Module):
    """A learnt gain per dimension that starts at one. With groups, that many equal parts of the last dimension are each
    normalised alone."""

    def __init__(self, dim: int, eps: float, groups: int = 1):
        super().__init__()
        self.add_parameter("weight", (dim,), Role("gain"), Constant(1.0))
        self.eps, self.groups = eps, groups

    def forward(self, x: torch.Tensor, *, pending: bool = False) -> torch.Tensor | PendingNorm:
        """pending: leave the norm to the next projection, which must support it (`fuses_norm`)."""
        if pending:
            return PendingNorm(x, self.weight, self.eps)
        if self.groups == 1:
            return rms_norm(x, self.eps, self.weight)
        weight = self.weight.unflatten(0, (self.groups, -1))
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.groups, -1))
        return (rms_norm(wide, self.eps) * weight).flatten(-2).to(x.dtype)
