"""Orthogonalisation in plain PyTorch."""

import torch

from fusedlm.ops.polar.schemes import Scheme, scheme_of


def start_scale(norm: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The factor of a matrix of this Frobenius norm, before the first step."""
    scale = (scheme.safety * norm + scheme.eps).reciprocal()
    return torch.where(norm > scheme.eps, scale, 0.0) if scheme.preconditioned else scale


def row_scale(gram: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(sum_j |A_ij|) of Gram matrices A (..., M, M) (arXiv 2512.04632), 0 for rows of zeros; in float32 or
    better."""
    sums = torch.linalg.vector_norm(gram, 1, dim=-1, dtype=torch.promote_types(gram.dtype, torch.float32))
    return torch.where(sums > 0, sums.clamp(min=torch.finfo(sums.dtype).tiny).rsqrt(), 0.0)


def orthogonalize(x, scheme: str, dtype: torch.dtype) -> torch.Tensor:
    settings = scheme_of(scheme)
    is_tall = x.shape[-2] > x.shape[-1]
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    full = full.mT if is_tall else full
    full = full * start_scale(torch.linalg.matrix_norm(full, keepdim=True), settings)
    if settings.preconditioned:
        full = full * row_scale(full @ full.mT)[..., None]
    y = full.to(dtype)
    for a, b, c in settings.coefficients:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.mT if is_tall else y
    return y.to(x.dtype)
