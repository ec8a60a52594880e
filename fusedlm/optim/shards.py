"""Hidden matrices whose rows several processes hold: which rows each of them has, and who orthogonalises what."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from fusedlm.distributed.tensors import held_range, replica_group, shard_group
from fusedlm.nn.module import Role
from fusedlm.optim.stacks import Part, parts_of


@dataclass(frozen=True)
class Piece:
    """The rows of a matrix that one process holds: `rows` of them, the first is row `first` of the matrix and row
    `start` of the process's part of the parameter seen as (-1, columns)."""

    first: int
    rows: int
    start: int

    def of(self, part: torch.Tensor) -> torch.Tensor:
        """These rows (rows, columns) of a process's part of the parameter, or of a tensor of its shape."""
        return part.view(-1, part.shape[-1])[self.start : self.start + self.rows]


@dataclass(frozen=True)
class Place:
    """Where this process is among those that hold a parameter: shard `shard` of `n_shards` in copy `copy` of
    `n_copies`; the groups of all shards of its copy, and of all copies of its shard, None where it is the only one."""

    copy: int
    n_copies: int
    shard: int
    n_shards: int
    shards: torch.distributed.ProcessGroup | None
    copies: torch.distributed.ProcessGroup | None

    @staticmethod
    def of(parameter: DTensor) -> "Place":
        shards, copies = shard_group(parameter)[0], replica_group(parameter)
        where = [(group.rank(), group.size()) if group is not None else (0, 1) for group in (copies, shards)]
        return Place(*where[0], *where[1], shards, copies)


def held_parts(parameter: DTensor, role: Role) -> list[Part]:
    """The matrices of a parameter of which this process and those with the other shards hold the rows: of experts that
    are divided over processes, its own experts'."""
    held, per_expert = held_range(parameter), parameter.shape[-2]
    parts = parts_of(parameter, role.splits)
    return parts if parameter.dim() == 2 else [part for part in parts if part.start // per_expert in held]


def whole_parts(parameter: DTensor, role: Role) -> list[Part] | None:
    """The matrices of a parameter of which this process alone holds all rows, by their rows in its part of the
    parameter; None: some matrix is cut, or other processes hold copies. So it is for stacks of experts that are sharded
    between experts."""
    place = Place.of(parameter)
    if place.n_copies > 1:
        return None
    parts = held_parts(parameter, role)
    for part in parts:
        if all(piece_of(part, shard, place.n_shards).rows < part.rows for shard in range(place.n_shards)):
            return None
    pieces = [piece_of(part, place.shard, place.n_shards) for part in parts]
    return [Part(parameter, piece.start, piece.rows) for piece in pieces if piece.rows]


def piece_of(part: Part, shard: int, n_shards: int) -> Piece:
    """The rows of a matrix in one shard of its parameter (out, in) or (experts, out, in), which is sharded by its first
    dimension, or a stack by its second; of `held_parts`."""
    shape, dim = part.parameter.shape, shard_group(part.parameter)[1]
    low, high = _chunk(shape[dim], shard, n_shards)
    begin, before = part.start, 0
    if len(shape) == 3 and dim == 0:
        low, high = low * shape[1], high * shape[1]
    elif dim == 1:
        expert, begin = divmod(part.start, shape[1])
        before = (expert - held_range(part.parameter).start) * (high - low)
    first, last = max(low, begin), min(high, begin + part.rows)
    if last <= first:
        return Piece(0, 0, 0)
    return Piece(first - begin, last - first, before + first - low)


def _chunk(n: int, index: int, n_chunks: int) -> tuple[int, int]:
    """As torch.chunk divides n: all chunks have the same size, but for the last ones."""
    size = -(-n // n_chunks)
    return min(index * size, n), min((index + 1) * size, n)


def owners(parts: list[Part], n: int) -> list[int]:
    """For each matrix the process, of n, that orthogonalises it: the most expensive first, each to the process with the
    least work so far."""
    work, found = [0] * n, [0] * len(parts)
    for index in sorted(range(len(parts)), key=lambda i: -_cost(parts[i])):
        found[index] = work.index(min(work))
        work[found[index]] += _cost(parts[index])
    return found


def _cost(part: Part) -> int:
    """Multiplications of a step of the polynomials, up to a factor."""
    short, long = sorted((part.rows, part.parameter.shape[-1]))
    return short * short * (2 * long + short)
