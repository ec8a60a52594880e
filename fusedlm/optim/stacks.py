"""Hidden matrices as Muon sees them: parts of parameters, those of one shape together."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fusedlm.distributed.tensors import zeros_by_rows

# Factors of an orthogonal update (out, in). shape: Keller Jordan's Muon; spectral: arXiv 2310.17813; rms:
# arXiv 2502.16982, the root mean square of AdamW's updates.
SCALINGS: dict[str, Callable[[int, int], float]] = {
    "shape": lambda n_out, n_in: max(1.0, n_out / n_in) ** 0.5,
    "spectral": lambda n_out, n_in: (n_out / n_in) ** 0.5,
    "rms": lambda n_out, n_in: 0.2 * max(n_out, n_in) ** 0.5,
}


NORM_EPS = 1e-8  # added to the root mean square of a row's updates
_LARGEST = 2**29  # elements of a stack: a step needs about four copies of it in 16 bits


@dataclass(frozen=True)
class Part:
    """One matrix of a parameter: rows `start` to `start + rows` of the parameter, or of the process's part of a sharded
    one, seen as (-1, columns)."""

    parameter: torch.nn.Parameter
    start: int
    rows: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part's rows (rows, columns) of a tensor with the shape of the parameter."""
        return tensor.view(-1, tensor.shape[-1])[self.start : self.start + self.rows]

    def of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The part's elements of a tensor (rows of the parameter,)."""
        return rows[self.start : self.start + self.rows]


@dataclass
class Stack:
    """Parts of one shape, which are orthogonalised together."""

    rows: int
    columns: int
    parts: list[Part] = field(default_factory=list)


def parts_of(parameter: torch.nn.Parameter, splits: tuple[tuple[str, int], ...]) -> list[Part]:
    """The matrices of a parameter (out, in), or (experts, out, in), whose rows are packed as `splits` says.

    Raises:
        ValueError: the parameter has no rows and columns, or other rows than the splits.
    """
    shape = tuple(parameter.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"a hidden matrix of shape {shape}: must be (out, in) or (experts, out, in)")
    rows = [n for _, n in splits] or [shape[-2]]
    if sum(rows) != shape[-2]:
        raise ValueError(f"splits {dict(splits)} do not sum to the {shape[-2]} rows of a matrix of shape {shape}")
    parts, start = [], 0
    for n_rows in rows * (shape[0] if len(shape) == 3 else 1):
        parts.append(Part(parameter, start, n_rows))
        start += n_rows
    return parts


def stacked(parts: list[Part]) -> list[Stack]:
    """Matrices of one shape, device and dtype in one stack, or in several of at most 2^29 elements; largest stacks
    first."""
    stacks: dict[tuple, list[Stack]] = {}
    for part in parts:
        parameter = part.parameter
        key = part.rows, parameter.shape[-1], parameter.device, parameter.dtype
        own = stacks.setdefault(key, [])
        if not own or (len(own[-1].parts) + 1) * part.rows * parameter.shape[-1] > _LARGEST:
            own.append(Stack(*key[:2]))
        own[-1].parts.append(part)
    found = [stack for own in stacks.values() for stack in own]
    return sorted(found, key=lambda stack: -len(stack.parts) * stack.rows * stack.columns)


def initialise(state: dict, parameter: torch.Tensor, *, with_rows: bool) -> None:
    """Momentum, and with rows their mean squares, of a parameter without a state."""
    if not state:
        state["momentum"] = zeros_by_rows(parameter, parameter.dim())
        if with_rows:
            state["row_square"] = zeros_by_rows(parameter, parameter.dim() - 1)
