"""Integer codes of a whole model by rounding each weight by itself: what `fusedlm pack` does without a better method,
which is any function that gives the same mapping."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fusedlm.nn.module import parameters_by_kind
from fusedlm.nn.quantized import quantized_layers
from fusedlm.quant.integer import IntegerMatrix

# Kinds of parameters that are looked up or give logits; hidden matrices are of the kind "matrix".
TABLES = ("embedding", "head")


@dataclass(frozen=True)
class Rounding:
    """How the matrices of one kind are rounded.

    bits: 2 to 8.
    deviations: the largest code is this many standard deviations of the row (12.85 at 6 bits, 20 at 8, in the entries
        to the 16 MB challenge): more take fewer bytes, at a larger error. None: it is the row's largest magnitude.
    group: columns that share a scale; None: the full row.
    """

    bits: int
    deviations: float | None = None
    group: int | None = None

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 2 to 8")
        if self.deviations is not None and not 0 < self.deviations < 1e6:
            raise ValueError(f"deviations={self.deviations:g} must be a positive number")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1")


@torch.no_grad()
def round_matrix(weight: torch.Tensor, rounding: Rounding, scale_dtype: torch.dtype = torch.bfloat16) -> IntegerMatrix:
    """Round a matrix (rows, columns) to nearest even codes, with the scale as it is stored. There is no floor on it.

    Raises:
        ValueError: the matrix is not finite.
    """
    if not weight.isfinite().all():
        raise ValueError("has NaN or infinity; pack an earlier checkpoint")
    weight = weight.float().cpu()
    largest, columns = 2 ** (rounding.bits - 1) - 1, weight.shape[1]
    group = rounding.group or columns
    reach = torch.stack([_reach(part, rounding.deviations) for part in weight.split(group, dim=1)], dim=1)
    scales = (reach / largest).to(scale_dtype)
    every = scales.float().repeat_interleave(group, dim=1)[:, :columns]
    codes = torch.where(every > 0, weight / every, 0.0).round().clamp(-largest, largest).to(torch.int8)
    return IntegerMatrix(codes, scales, rounding.bits, rounding.group)


def _reach(weight: torch.Tensor, deviations: float | None) -> torch.Tensor:
    """(rows,): what the largest code stands for."""
    largest = weight.abs().amax(1)
    if deviations is None:
        return largest
    reach = deviations * weight.std(1, correction=0)
    return torch.where(reach < largest / 1000, largest, reach)  # a row of equal weights has no deviation


@torch.no_grad()
def round_model(
    model: torch.nn.Module,
    matrices: Rounding,
    tables: Rounding,
    *,
    kept: Mapping[str, IntegerMatrix] | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, IntegerMatrix]:
    """The hidden matrices, embeddings and heads of a model as integer codes, by the names of its parameters. A stack of
    matrices (experts) is one matrix with their rows one after the other.

    Args:
        kept: matrices that have codes already.

    Raises:
        ValueError: names a weight that is not finite, or the model has quantised layers.
    """
    if quantized_layers(model):
        raise ValueError("the model is quantised already; pack the run that it is from")
    found = dict(kept or {})
    for name, kind, parameter in parameters_by_kind(model):
        if name in found:
            continue
        if (kind == "matrix" or kind in TABLES) and parameter.ndim >= 2:
            rounding = tables if kind in TABLES else matrices
            try:
                found[name] = round_matrix(parameter.reshape(-1, parameter.shape[-1]), rounding, scale_dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return found
