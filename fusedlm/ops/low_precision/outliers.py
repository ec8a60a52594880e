"""Columns of an activation with outliers, which leave the 8-bit products for a narrow one in the dtype of x.

The number of columns that can leave is fixed, so that shapes do not depend on values: unused places are multiplied by
zero. Autograd gives the gradients: the 8-bit products see zeros in these columns of x, and the narrow product computes
the columns of both gradients.
"""

import math

import torch

_NORMAL = 0.6744897501960817  # the median absolute deviation of a standard normal variable


def z_scores(x_NK: torch.Tensor) -> torch.Tensor:
    """The robust z-score of the largest magnitude of each column, (K,) float32: its distance from the median of all
    columns, over the median of these distances and normal (Iglewicz and Hoaglin, 1993). 0 where that median is 0, as
    where most columns are the same."""
    largest = torch.linalg.vector_norm(x_NK.detach(), float("inf"), dim=0).float()
    distance = largest - largest.median()
    deviation = distance.abs().median()
    return torch.where(deviation > 0, _NORMAL * distance / deviation, 0.0)


def split(x_NK: torch.Tensor, threshold: float, capacity: int):
    """Isolate the columns whose z-score is above the threshold, the `capacity` largest of them.

    Returns:
        x with zeros in these columns; (capacity,) indices of columns; x in these, (N, capacity), zeros where a place is
        unused; () numbers of columns above the threshold, and of those isolated.
    """
    z = z_scores(x_NK)
    top = z.topk(capacity)
    isolated = top.values > threshold
    is_outlier = torch.zeros_like(z, dtype=torch.bool).index_put((top.indices,), isolated)
    narrow = torch.where(isolated, x_NK.index_select(1, top.indices), 0.0)
    found = (z > threshold).sum()
    return torch.where(is_outlier, 0.0, x_NK), top.indices, narrow, found, isolated.sum()


def narrow_product(narrow: torch.Tensor, weight_MK: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(N, M) of the isolated columns."""
    return narrow @ weight_MK.index_select(1, index).to(narrow.dtype).t()


def default_capacity(n_columns: int) -> int:
    """One column of 64, at least 16, a multiple of 16; all of a narrower matrix."""
    return min(n_columns, max(16, math.ceil(n_columns / 64 / 16) * 16))
