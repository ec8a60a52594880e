"""Integer codes of a model by rounding each weight by itself: what `fusedlm pack` does without a better method,
which is any function that gives the same mapping."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fusedlm.nn.module import parameters_by_kind
from fusedlm.nn.quantized import quantized_weights
from fusedlm.ops.quantized.integer import integer_codes, integer_scales
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
def round_matrix(weight: torch.Tensor, rounding: Rounding) -> IntegerMatrix:
    """Round a matrix (rows, columns) to nearest even codes, with bfloat16 scales.

    Raises:
        ValueError: the matrix is not finite.
    """
    if not weight.isfinite().all():
        raise ValueError("has NaN or infinity; pack an earlier checkpoint")
    weight, bits, group = weight.float().cpu(), rounding.bits, rounding.group
    scales = integer_scales(weight, bits, group, rounding.deviations)
    codes = integer_codes(weight, scales, bits, group).to(torch.int8)
    return IntegerMatrix(codes, scales, bits, group)


@torch.no_grad()
def round_model(
    model: torch.nn.Module,
    matrices: Rounding,
    tables: Rounding,
    *,
    kept: Mapping[str, IntegerMatrix] | None = None,
) -> dict[str, IntegerMatrix]:
    """The hidden matrices, embeddings and heads of a model as integer codes, by the names of its parameters. A stack of
    matrices (experts) is one matrix with their rows one after the other.

    Args:
        kept: matrices that have codes already.

    Raises:
        ValueError: names a weight that is not finite, or the model is quantised.
    """
    if quantized_weights(model):
        raise ValueError("the model is quantised already; pack the run that it is from")
    found = dict(kept or {})
    for name, kind, parameter in parameters_by_kind(model):
        if name in found:
            continue
        if (kind == "matrix" or kind in TABLES) and parameter.ndim >= 2:
            rounding = tables if kind in TABLES else matrices
            try:
                found[name] = round_matrix(parameter.reshape(-1, parameter.shape[-1]), rounding)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return found
