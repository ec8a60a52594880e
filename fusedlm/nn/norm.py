"""RMSNorm (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F

from fusedlm.nn.linear import Linear, product_dtype
from fusedlm.ops.common import Choice
from fusedlm.ops.rmsnorm_linear.op import rmsnorm_linear


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 or better, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        weight = weight.to(wide.dtype)
    return F.rms_norm(wide, (x.shape[-1],), weight, eps).to(x.dtype)


class RMSNorm(torch.nn.Module):
    """Learnt gain, starting at one."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.eps, self.weight)


def project_normed(x: torch.Tensor, norm: RMSNorm, linear: Linear, choice: Choice) -> torch.Tensor:
    """linear(norm(x)), for where nothing else reads norm(x), by an implementation of `rmsnorm_linear`."""
    return rmsnorm_linear(
        x, norm.weight, linear.weight, eps=norm.eps, dtype=product_dtype(x), implementation=choice.function
    )
