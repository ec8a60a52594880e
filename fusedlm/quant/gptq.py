"""Rounding that compensates its errors: GPTQ (Frantar et al., arXiv 2210.17323).

A matrix W (N, K) is used as x W^T. With H = E[x x^T] over calibration tokens, W + E has the mean squared output error
tr(E H E^T). Columns are rounded one after another; each error is spread over the columns that are not rounded yet, so
that the output changes least. Rows do not depend on each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusedlm.quant.formats import Format, column_scales

DAMPING = 0.01  # of the mean of the diagonal
_RAISE, _MOST = 10.0, 1e6  # factor of a damping with which the matrix is singular, and where to give up
BLOCK = 128
_TOGETHER = 2**26  # elements of the weights, and of the factors of their Hessians, that are rounded together


@dataclass(frozen=True)
class Inverse:
    """upper_KK: U with U^T U = (H + damping * mean diagonal * I)^-1, in the order of `order_K`: U row i divided by
    its diagonal element is how the error of column order[i] is spread.

    damping: what was needed. dead: columns without input.
    """

    upper_KK: torch.Tensor
    order_K: torch.Tensor
    damping: float
    dead: int


def inverse_factor(hessian_KK: torch.Tensor, *, ordered: bool = True, damping: float = DAMPING) -> Inverse:
    """The Cholesky factor of the damped inverse.

    Args:
        hessian_KK: positive semidefinite; computed in float64.
        ordered: by descending diagonal, so that the columns with the largest inputs are rounded while most others can
            still compensate; else as they are.
        damping: fraction of the mean of the diagonal that is added to it; raised tenfold while the matrix is singular.

    Raises:
        ValueError: the Hessian is not finite, or singular with any damping.
    """
    hessian_KK = hessian_KK.double()
    if not hessian_KK.isfinite().all():
        raise ValueError("the Hessian has NaN or infinity; the activations of the calibration text are not finite")
    diagonal_K = hessian_KK.diagonal()
    dead_K = diagonal_K <= 0
    width = len(diagonal_K)
    order_K = torch.arange(width, device=hessian_KK.device)
    if ordered:
        order_K = diagonal_K.argsort(descending=True, stable=True)
    mean = diagonal_K.mean()
    if mean <= 0:  # no input at all: any error is as good as another
        identity = torch.eye(width, dtype=torch.float64, device=hessian_KK.device)
        return Inverse(identity, order_K, damping, int(dead_K.sum()))
    # A column without input has an error of no consequence: it is rounded by itself, and takes no errors of others.
    hessian_KK = hessian_KK + torch.diag(torch.where(dead_K, mean, 0.0))
    hessian_KK = hessian_KK[order_K][:, order_K]
    used = damping
    while True:
        # H = R R^T with R upper triangular, by the Cholesky factor of the matrix in reverse order; then U = R^-1. This
        # is the factor of the inverse without forming the inverse.
        damped_KK = hessian_KK + used * mean * torch.eye(width, dtype=torch.float64, device=hessian_KK.device)
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK.flip(0, 1))
        if info == 0 and lower_KK.isfinite().all():
            break
        used = used * _RAISE if used > 0 else 1e-8
        if used > _MOST:
            raise ValueError("the Hessian is singular with any damping; calibrate with other text")
    identity = torch.eye(width, dtype=torch.float64, device=hessian_KK.device)
    upper_KK = torch.linalg.solve_triangular(lower_KK.flip(0, 1), identity, upper=True)
    return Inverse(upper_KK, order_K, used, int(dead_K.sum()))


def round_compensated(
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    format: Format,
    inverses: Sequence[Inverse],
    *,
    block: int = BLOCK,
) -> list[torch.Tensor]:
    """The levels (N, K) float64 of weights, their columns rounded in the order of the inverses with compensation.

    Scales are fixed before, of groups too, so that any order of columns can be used. Weights are rounded together: time
    goes with the number of columns, one of which waits for the one before.

    Args:
        weights: of one shape (N, K).
        scales: of each, (N, G) as `format` stores them.
        inverses: of each.
        block: columns whose errors are spread over the rest in one product; changes the rounding of sums only.
    """
    n_rows, width = weights[0].shape
    n_together = max(1, _TOGETHER // ((n_rows + width) * width))
    found = []
    for start in range(0, len(weights), n_together):
        some = slice(start, start + n_together)
        found += _round_together(weights[some], scales[some], format, inverses[some], block)
    return found


def _round_together(weights, scales, format: Format, inverses, block: int) -> list[torch.Tensor]:
    width = weights[0].shape[1]
    upper_BKK = torch.stack([inverse.upper_KK for inverse in inverses])
    orders = [inverse.order_K for inverse in inverses]
    weight_BNK = torch.stack([w.double()[:, order_K] for w, order_K in zip(weights, orders, strict=True)])
    scale_BNK = torch.stack(
        [column_scales(format, s, width)[:, order_K] for s, order_K in zip(scales, orders, strict=True)]
    )
    levels_BNK = torch.empty_like(weight_BNK)
    for start in range(0, width, block):
        stop = min(start + block, width)
        part_BNC = weight_BNK[..., start:stop].clone()
        errors_BNC = torch.empty_like(part_BNC)
        for i in range(stop - start):
            row_BC = upper_BKK[:, start + i, start:stop]
            column_BN, scale_BN = part_BNC[..., i], scale_BNK[..., start + i]
            level_BN = format.nearest(torch.where(scale_BN > 0, column_BN / scale_BN, 0.0))
            levels_BNK[..., start + i] = level_BN
            errors_BNC[..., i] = (column_BN - level_BN * scale_BN) / row_BC[:, i, None]
            part_BNC[..., i + 1 :] -= errors_BNC[..., i, None] * row_BC[:, None, i + 1 :]
        weight_BNK[..., stop:] -= errors_BNC @ upper_BKK[:, start:stop, stop:]
    found = []
    for levels_NK, order_K in zip(levels_BNK, orders, strict=True):
        unordered_NK = torch.empty_like(levels_NK)
        unordered_NK[:, order_K] = levels_NK
        found.append(unordered_NK)
    return found


def round_plain(weight_NK: torch.Tensor, scales_NG: torch.Tensor, format: Format) -> torch.Tensor:
    """The levels (N, K) float64 of a weight, each element rounded by itself."""
    scale_NK = column_scales(format, scales_NG, weight_NK.shape[1])
    return format.nearest(torch.where(scale_NK > 0, weight_NK.double() / scale_NK, 0.0))


def output_error(error_NK: torch.Tensor, hessian_KK: torch.Tensor) -> torch.Tensor:
    """(N,) float64, the mean squared error of each output: e H e^T of each row."""
    error_NK = error_NK.double()
    return (error_NK @ hessian_KK.double() * error_NK).sum(-1)


def search_scales(weight_NK: torch.Tensor, format: Format, hessian_KK: torch.Tensor) -> torch.Tensor:
    """Of each row, or group of a row, the scale among the format's candidates with which rounding by itself has the
    least e H e^T; of a group with the block of H that belongs to it. The first of equals.

    Returns:
        (N, G) scales as the format stores them.
    """
    best_NG = least_NG = None
    for scales_NG in format.candidates(weight_NK):
        levels_NK = round_plain(weight_NK, scales_NG, format)
        error_NK = levels_NK * column_scales(format, scales_NG, weight_NK.shape[1]) - weight_NK.double()
        size = format.group or weight_NK.shape[1]
        parts = range(0, weight_NK.shape[1], size)
        found = [output_error(error_NK[:, i : i + size], hessian_KK[i : i + size, i : i + size]) for i in parts]
        found_NG = torch.stack(found, 1) if found else error_NK.new_zeros(scales_NG.shape)
        if best_NG is None:
            best_NG, least_NG = scales_NG.clone(), found_NG
            continue
        better_NG = found_NG < least_NG
        best_NG = torch.where(better_NG, scales_NG, best_NG)
        least_NG = torch.where(better_NG, found_NG, least_NG)
    return best_NG
