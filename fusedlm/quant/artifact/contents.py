"""The tensors of a model as they are packed: matrices in codes, the rest in a dtype of two or four bytes."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from fusedlm.quant.integer import IntegerMatrix
from fusedlm.runs.state import model_tensors


@torch.no_grad()
def contents(
    model: torch.nn.Module, matrices: Mapping[str, IntegerMatrix], floats: torch.dtype
) -> dict[str, IntegerMatrix | torch.Tensor]:
    """By the names of the model's state, on the CPU.

    Args:
        matrices: codes of some of its parameters, by name.
        floats: dtype of all other tensors of floats.

    Raises:
        ValueError: a matrix is of no parameter, or a tensor has elements that the dtype cannot hold; names it.
    """
    own = model_tensors(model)
    if unknown := sorted(matrices.keys() - own.keys()):
        raise ValueError(f"matrix {unknown[0]!r} is no parameter of the model")
    found: dict[str, IntegerMatrix | torch.Tensor] = {}
    for name, tensor in own.items():
        if name in matrices:
            matrix = matrices[name]
            found[name] = replace(matrix, codes=matrix.codes.cpu(), scales=matrix.scales.cpu())
            continue
        tensor = tensor.detach().cpu()
        cast = tensor.to(floats) if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not cast.isfinite().all():
            problem = "has NaN or infinity" if not tensor.isfinite().all() else f"has elements too large for {floats}"
            raise ValueError(f"{name}: {problem}; pack another checkpoint, or give other floats")
        found[name] = cast
    return found
