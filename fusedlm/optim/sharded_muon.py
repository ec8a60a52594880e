"""A step of Muon or NorMuon on matrices whose rows are sharded over processes.

Momentum and the mean squares of rows are sharded as the parameters are. Matrices are gathered while they are
orthogonalised (`fusedlm.optim.exchange`), and the two norms that NorMuon's rescaling compares are summed over the
shards: the result is that of one process, up to rounding.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fusedlm.distributed import local
from fusedlm.nn.module import Role
from fusedlm.ops import orthogonalize
from fusedlm.optim.exchange import Alike, MatrixExchange
from fusedlm.optim.shards import Place, held_parts
from fusedlm.optim.stacks import NORM_EPS, SCALINGS, Part, Stack

_ROUND = 2**27  # elements per process that are exchanged at once: buffers stay below a GiB


class ShardedMatrices:
    """The matrices of the sharded parameters of one group.

    Args:
        parameters: DTensors on one mesh.
        roles: of each.
        update_dtype: of updates that are sent and orthogonalised; None: that of the parameters.
        uses_kernels: update by the kernels of `fusedlm.optim.fused_muon`, float32 parameters alone.
    """

    def __init__(
        self, parameters: list[DTensor], roles: list[Role], update_dtype: torch.dtype | None, uses_kernels: bool
    ):
        self._roles = dict(zip(parameters, roles, strict=True))
        self._dtype = update_dtype or parameters[0].dtype
        self._rows = _FusedRows if uses_kernels else _Rows
        self._planned: list[int] = []  # ids of parameters
        self._rounds: list[_Rows | _FusedRows] = []

    def step(self, optimizer: torch.optim.Optimizer, group: dict) -> None:
        """As `fusedlm.optim.muon._step_stack` on every matrix that has a gradient, and a state."""
        parameters = [parameter for parameter in self._roles if parameter.grad is not None]
        if not parameters:
            return
        self._plan(parameters)
        for held in self._rounds:
            exchange = held.exchange
            rows = held.momentum(optimizer, group)
            found = exchange.orthogonalize(rows, self._dtype, lambda stack: orthogonalize(stack, group["scheme"]))
            updates = {key: torch.stack([found[i] for i in members]) for key, members in exchange.alike.items()}
            held.update(optimizer, group, updates)

    def _plan(self, parameters: list[DTensor]) -> None:
        if [id(parameter) for parameter in parameters] == self._planned:
            return
        place = Place.of(parameters[0])
        limit = _ROUND * place.n_copies * place.n_shards
        rounds: list[list[Part]] = [[]]
        n_elements = 0
        for parameter in parameters:
            for part in held_parts(parameter, self._roles[parameter]):
                n_elements += part.rows * parameter.shape[-1]
                if n_elements > limit and rounds[-1]:
                    rounds.append([])
                    n_elements = part.rows * parameter.shape[-1]
                rounds[-1].append(part)
        self._planned = [id(parameter) for parameter in parameters]
        self._rounds = [self._rows(MatrixExchange(parts, place), self._dtype) for parts in rounds]


class _Rows:
    """The rows that a process holds of the matrices of an exchange, updated in plain PyTorch: the reference of
    `_FusedRows`, which has the same methods."""

    def __init__(self, exchange: MatrixExchange, update_dtype: torch.dtype):
        self.exchange = exchange

    def _held(self, tensors: Callable[[DTensor], torch.Tensor]) -> list[torch.Tensor]:
        """The process's rows of each matrix in a tensor of its parameter."""
        pairs = zip(self.exchange.parts, self.exchange.pieces, strict=True)
        return [piece.of(local(tensors(part.parameter)).contiguous()) for part, piece in pairs]

    def momentum(self, optimizer: torch.optim.Optimizer, group: dict) -> list[torch.Tensor]:
        """Updates the momentum; the update of each matrix before it is orthogonalised (rows, columns)."""
        momenta = self._held(lambda parameter: optimizer.state[parameter]["momentum"])
        gradients = self._held(lambda parameter: parameter.grad)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        return torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta

    def update(self, optimizer: torch.optim.Optimizer, group: dict, updates: dict[Alike, torch.Tensor]) -> None:
        """Update the parameters by the orthogonalised rows, those of one shape at once (matrices, rows, columns)."""
        dtype = local(self.exchange.parts[0].parameter).dtype
        updates = {key: update.to(dtype) for key, update in updates.items()}
        if group["beta2"] is not None:
            self._normalise(optimizer, group["beta2"], updates)
        for (rows, _, columns), members in self.exchange.alike.items():
            update = updates[rows, _, columns]
            update *= SCALINGS[group["scaling"]](rows, columns)
            weights = [self.exchange.pieces[i].of(local(self.exchange.parts[i].parameter)) for i in members]
            if group["weight_decay"]:
                stacked = torch.stack(weights)
                decayed = torch.where(update * stacked >= 0, stacked, 0.0) if group["cautious"] else stacked
                update.add_(decayed, alpha=group["weight_decay"])
            torch._foreach_add_(weights, list(update), alpha=-float(group["lr"]))

    def _normalise(self, optimizer: torch.optim.Optimizer, beta2: float, updates: dict[Alike, torch.Tensor]) -> None:
        """`fusedlm.optim.muon._normalise_rows` of whole matrices, of which the process has some rows; in place."""
        factors = {}
        for key, members in self.exchange.alike.items():
            mean_square = updates[key].square().mean(-1)  # (matrices, rows)
            rows = [self._row_squares(optimizer, i) for i in members]
            v = torch.stack(rows).lerp_(mean_square, 1 - beta2)
            torch._foreach_copy_(rows, list(v))
            factors[key] = (v.sqrt() + NORM_EPS).reciprocal(), mean_square
        ratios = _ratios(self.exchange, factors)
        for key, (inverse, _) in factors.items():
            updates[key] *= (inverse * ratios[key][:, None])[..., None]

    def _row_squares(self, optimizer: torch.optim.Optimizer, index: int) -> torch.Tensor:
        piece = self.exchange.pieces[index]
        rows = local(optimizer.state[self.exchange.parts[index].parameter]["row_square"]).view(-1)
        return rows[piece.start : piece.start + piece.rows]


class _FusedRows:
    """The rows that a process holds of the matrices of an exchange, updated by kernels: they read `found_inf`, so that
    the host does not wait for the device before a step."""

    def __init__(self, exchange: MatrixExchange, update_dtype: torch.dtype):
        from fusedlm.optim.fused_muon import StackLaunches

        self.exchange, self._dtype = exchange, update_dtype
        self._launches = {}
        for key, members in exchange.alike.items():
            pieces = [(exchange.parts[i].parameter, exchange.pieces[i]) for i in members]
            parts = [Part(parameter, piece.start, piece.rows) for parameter, piece in pieces]
            self._launches[key] = StackLaunches(Stack(*key[1:], parts), update_dtype)

    def momentum(self, optimizer: torch.optim.Optimizer, group: dict) -> list[torch.Tensor]:
        """As `_Rows.momentum`."""
        parts = self.exchange.parts
        device = local(parts[0].parameter).device
        rows = [torch.empty(0, part.parameter.shape[-1], dtype=self._dtype, device=device) for part in parts]
        for key, members in self.exchange.alike.items():
            updates, _ = self._launches[key].momentum(optimizer, group, (len(members), *key[1:]))
            for i, update in zip(members, updates, strict=True):
                rows[i] = update
        return rows

    def update(self, optimizer: torch.optim.Optimizer, group: dict, updates: dict[Alike, torch.Tensor]) -> None:
        """As `_Rows.update`."""
        factors, ratios = {}, {}
        if group["beta2"] is not None:
            for key, launches in self._launches.items():
                factors[key] = launches.row_factors(optimizer, updates[key], group["beta2"])
            ratios = _ratios(self.exchange, factors)
        for key, launches in self._launches.items():
            scaling = SCALINGS[group["scaling"]](key[0], key[2])
            by_row = (factors[key][0], ratios[key]) if factors else None
            launches.apply(optimizer, group, updates[key], scaling, by_row)


def _ratios(
    exchange: MatrixExchange, factors: dict[Alike, tuple[torch.Tensor, torch.Tensor]]
) -> dict[Alike, torch.Tensor]:
    """|O|_F of each matrix, over that of its rows after they are multiplied, of which the process holds some.

    Args:
        factors: by shape what rows are multiplied by, and their mean squares, both (matrices, rows).

    Returns:
        By shape (matrices,).
    """
    example = local(exchange.parts[0].parameter)
    sums = torch.zeros(len(exchange.parts), 2, dtype=example.dtype, device=example.device)
    for key, (inverse, mean_square) in factors.items():
        sums[exchange.index_of(key)] = torch.stack([mean_square.sum(-1), (mean_square * inverse.square()).sum(-1)], -1)
    if exchange.place.shards is not None:
        dist.all_reduce(sums, group=exchange.place.shards)
    before, after = sums.sqrt().unbind(-1)
    ratio = before / after.clamp(min=torch.finfo(sums.dtype).tiny)  # a matrix of zeros stays zero
    return {key: ratio[exchange.index_of(key)] for key in factors}
