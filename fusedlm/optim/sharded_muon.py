"""A step of Muon or NorMuon on matrices whose rows are sharded over processes.

Momentum and the mean squares of rows are sharded as the parameters are. Matrices are gathered while they are
orthogonalised (`fusedlm.optim.exchange`), and the two norms that NorMuon's rescaling compares are summed over the
shards: the result is that of one process, up to rounding.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fusedlm.distributed import local
from fusedlm.nn.module import Role
from fusedlm.ops import orthogonalize
from fusedlm.optim.exchange import MatrixExchange
from fusedlm.optim.shards import Place, held_parts
from fusedlm.optim.stacks import NORM_EPS, SCALINGS, Part

_ROUND = 2**27  # elements per process that are exchanged at once: buffers stay below a GiB


class ShardedMatrices:
    """The matrices of the sharded parameters of one group.

    Args:
        parameters: DTensors on one mesh.
        roles: of each.
        update_dtype: of updates that are sent and orthogonalised; None: that of the parameters.
    """

    def __init__(self, parameters: list[DTensor], roles: list[Role], update_dtype: torch.dtype | None):
        self._roles = dict(zip(parameters, roles, strict=True))
        self._dtype = update_dtype
        self._planned: list[int] = []  # ids of parameters
        self._rounds: list[MatrixExchange] = []

    def step(self, optimizer: torch.optim.Optimizer, group: dict) -> None:
        """As `fusedlm.optim.muon._step_stack` on every matrix that has a gradient, and a state."""
        parameters = [parameter for parameter in self._roles if parameter.grad is not None]
        if not parameters:
            return
        self._plan(parameters)
        momentum = group["momentum"]
        momenta = [local(optimizer.state[parameter]["momentum"]) for parameter in parameters]
        gradients = [local(parameter.grad).contiguous() for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta, momentum) if group["nesterov"] else momenta
        update_of = dict(zip(parameters, updates, strict=True))
        for exchange in self._rounds:
            rows = [piece.of(update_of[part.parameter]) for part, piece in _pairs(exchange)]
            dtype = self._dtype or rows[0].dtype
            found = exchange.orthogonalize(rows, dtype, lambda stack: orthogonalize(stack, group["scheme"]))
            _apply(optimizer, group, exchange, found)

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
        self._rounds = [MatrixExchange(parts, place) for parts in rounds]


def _pairs(exchange: MatrixExchange):
    return zip(exchange.parts, exchange.pieces, strict=True)


def _apply(
    optimizer: torch.optim.Optimizer, group: dict, exchange: MatrixExchange, found: list[torch.Tensor]
) -> None:
    """Update the process's rows of each matrix by the orthogonalised ones, those of one shape at once."""
    alike = exchange.alike
    dtype = local(exchange.parts[0].parameter).dtype
    updates = {key: torch.stack([found[i] for i in members]).to(dtype) for key, members in alike.items()}
    if group["beta2"] is not None:
        _normalise(optimizer, exchange, group["beta2"], updates)
    for (rows, _, columns), members in alike.items():
        update = updates[rows, _, columns]
        update *= SCALINGS[group["scaling"]](rows, columns)
        weights = [exchange.pieces[i].of(local(exchange.parts[i].parameter)) for i in members]
        if group["weight_decay"]:
            stacked = torch.stack(weights)
            decayed = torch.where(update * stacked >= 0, stacked, 0.0) if group["cautious"] else stacked
            update.add_(decayed, alpha=group["weight_decay"])
        torch._foreach_add_(weights, list(update), alpha=-float(group["lr"]))


def _normalise(
    optimizer: torch.optim.Optimizer, exchange: MatrixExchange, beta2: float, updates: dict
) -> None:
    """`fusedlm.optim.muon._normalise_rows` of whole matrices, of which the process has some rows; in place."""
    example = local(exchange.parts[0].parameter)
    sums = torch.zeros(len(exchange.parts), 2, dtype=example.dtype, device=example.device)
    inverses = {}
    for key, members in exchange.alike.items():
        mean_square = updates[key].square().mean(-1)  # (matrices, rows)
        rows = [_row_squares(optimizer, exchange, i) for i in members]
        v = torch.stack(rows).lerp_(mean_square, 1 - beta2)
        torch._foreach_copy_(rows, list(v))
        inverses[key] = inverse = (v.sqrt() + NORM_EPS).reciprocal()
        sums[exchange.index_of(key)] = torch.stack([mean_square.sum(-1), (mean_square * inverse.square()).sum(-1)], -1)
    if exchange.place.shards is not None:
        dist.all_reduce(sums, group=exchange.place.shards)
    before, after = sums.sqrt().unbind(-1)
    ratio = before / after.clamp(min=torch.finfo(sums.dtype).tiny)  # a matrix of zeros stays zero
    for key in exchange.alike:
        updates[key] *= (inverses[key] * ratio[exchange.index_of(key), None])[..., None]


def _row_squares(optimizer: torch.optim.Optimizer, exchange: MatrixExchange, index: int) -> torch.Tensor:
    piece = exchange.pieces[index]
    rows = local(optimizer.state[exchange.parts[index].parameter]["row_square"]).view(-1)
    return rows[piece.start : piece.start + piece.rows]
