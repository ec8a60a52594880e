"""A low-rank term that takes back a part of the rounding error of a matrix."""

from dataclasses import dataclass

import torch

from fusedlm.quant.gptq import DAMPING

FACTOR_DTYPE = torch.float16


@dataclass(frozen=True)
class LowRank:
    """left_NR (N, R) times right_RK (R, K), both float16."""

    left_NR: torch.Tensor
    right_RK: torch.Tensor

    def values(self) -> torch.Tensor:
        """(N, K), multiplied in float32."""
        return self.left_NR.float() @ self.right_RK.float()

    @property
    def nbytes(self) -> int:
        return self.left_NR.nbytes + self.right_RK.nbytes


def low_rank_bytes(n_rows: int, width: int, rank: int) -> int:
    """Bytes of the factors of a matrix (n_rows, width)."""
    return FACTOR_DTYPE.itemsize * rank * (n_rows + width)


def correction(error_NK: torch.Tensor, hessian_KK: torch.Tensor, rank: int) -> LowRank:
    """The term C of a rank for which E = error + C has the least tr(E H E^T).

    With H = L L^T it is minus the truncated singular value decomposition of error L, times L^-1 (Eckart and Young). H
    is damped as in GPTQ.

    Raises:
        ValueError: the rank is not from 1 to the smaller side.
    """
    n_rows, width = error_NK.shape
    if not 1 <= rank <= min(n_rows, width):
        raise ValueError(f"rank={rank} must be from 1 to {min(n_rows, width)}, the smaller side of the matrix")
    hessian_KK = hessian_KK.double()
    mean = hessian_KK.diagonal().mean()
    extra = DAMPING * mean if mean > 0 else 1.0
    damped_KK = hessian_KK + extra * torch.eye(width, dtype=torch.float64, device=hessian_KK.device)
    root_KK = torch.linalg.cholesky(damped_KK)
    left, sizes, right = torch.linalg.svd(error_NK.double() @ root_KK, full_matrices=False)
    left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    right = torch.linalg.solve_triangular(root_KK, right, upper=False, left=False)
    # Factors of equal size, so that neither leaves the range of float16.
    balance = (sizes / right.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    scaled = torch.where(balance > 0, sizes / balance, 0.0)
    return LowRank((-left * scaled).to(FACTOR_DTYPE), (balance[:, None] * right).to(FACTOR_DTYPE))
