"""The state of one sequence, apart from any batch: taken out of a state, joined with others, put into a static one.

Two kinds of parts make up a row. The caches of all tokens can be cut into ranges and concatenated again. Windows and
recurrent states belong to one length: they are a snapshot, which only continues at exactly that length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusedlm.model.state import State
from fusedlm.nn.cache import TokenCache, WindowCache
from fusedlm.nn.recurrent_state import RecurrentState

Snapshot = list[tuple[torch.Tensor | None, ...]]


@dataclass(frozen=True)
class Row:
    """length: tokens seen. tokens: (length, ...) of every cache of all tokens. snapshot: the tensors of every other
    part, without the dimension of rows."""

    length: int
    tokens: list[torch.Tensor]
    snapshot: Snapshot

    def nbytes(self) -> int:
        return tensor_bytes(self.tokens) + snapshot_bytes(self.snapshot)


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def snapshot_bytes(snapshot: Snapshot) -> int:
    return tensor_bytes([x for part in snapshot for x in part if x is not None])


def needs_snapshot(model) -> bool:
    """Whether the model has a part whose state cannot be cut at any length."""
    return bool(_fixed(model.init_state(1)))


def take_tokens(state: State, row: int, first: int, last: int) -> list[torch.Tensor]:
    """Copies (last - first, ...) of the tokens [first, last) of a row, of every cache of all tokens."""
    return [part.rows[row, first:last].clone() for part in _caches(state)]


def take_snapshot(state: State, row: int, length: int) -> Snapshot:
    """Copies of the parts of a row that belong to its length, which is `length`."""
    return [_taken(part, row, length) for part in _fixed(state)]


def take_row(state: State, row: int, length: int | None = None) -> Row:
    """A copy of a row. length: its tokens, which a static state does not know on the host; None: as the state says."""
    length = state.lengths[row] if length is None else length
    if length == 0:
        return empty_row()
    return Row(length, take_tokens(state, row, 0, length), take_snapshot(state, row, length))


def empty_row() -> Row:
    """Of a sequence that has seen no token."""
    return Row(0, [], [])


def join_rows(model, rows: Sequence[Row], max_tokens: int | None = None) -> State:
    """A state that grows, of these rows in order; their tensors are copied.

    Args:
        max_tokens: room of every row; None: caches grow with the tokens.
    """
    state = model.init_state(len(rows), max_tokens)
    state.lengths = [row.length for row in rows]
    longest = max(state.lengths)
    if longest == 0:
        return state
    state.next_position_B.copy_(torch.tensor(state.lengths))
    filled = [row for row in rows if row.length]
    for i, cache in enumerate(_caches(state)):
        like = filled[0].tokens[i]
        cache.rows = like.new_zeros(len(rows), longest if max_tokens is None else max_tokens, *like.shape[1:])
        for b, row in enumerate(rows):
            if row.length:
                cache.rows[b, : row.length] = row.tokens[i]
    for i, part in enumerate(_fixed(state)):
        _join(part, [row.snapshot[i] if row.length else None for row in rows])
    return state


def put_row(state: State, index: int, row: Row) -> None:
    """Replace a row of a static state by another; `State.set_lengths` counts its tokens."""
    if row.length == 0:
        for part in state.parts():
            for tensor in part.tensors():
                tensor[index] = 0
        return
    for cache, tokens in zip(_caches(state), row.tokens, strict=True):
        cache.rows[index, : row.length] = tokens
        # Attention multiplies what follows by 0, and the row before may have had infinities.
        cache.rows[index, row.length :] = 0
    for part, tensors in zip(_fixed(state), row.snapshot, strict=True):
        _put(part, index, tensors, row.length)


def move_row(state: State, source: int, target: int) -> None:
    """Copy a row of a static state over another."""
    for part in state.parts():
        for tensor in part.tensors():
            tensor[target] = tensor[source]


def static_rows(model, like: Row, n_rows: int, capacity: int, spare: int = 0) -> State:
    """A static state of so many rows, whose contents are meaningless; like: any row that has seen a token."""
    shortened = [
        (tensors[0][-1:],) if isinstance(part, WindowCache) else tensors
        for part, tensors in zip(_fixed(model.init_state(1)), like.snapshot, strict=True)
    ]
    tiny = Row(1, [tokens[:1] for tokens in like.tokens], shortened)
    state = join_rows(model, [tiny] * n_rows)
    state.make_static(capacity, spare)
    return state


def copy_rows(source: State, target: State, n_rows: int) -> None:
    """Copy the first rows of a static state into another one, which may have more or less room than theirs."""
    for part, other in zip(source.parts(), target.parts(), strict=True):
        for tensor, into in zip(part.tensors(), other.tensors(), strict=True):
            if isinstance(part, TokenCache):
                n_tokens = min(tensor.shape[1], into.shape[1])
                into[:n_rows, :n_tokens] = tensor[:n_rows, :n_tokens]
            else:
                into[:n_rows] = tensor[:n_rows]


def _caches(state: State) -> list[TokenCache]:
    return [part for part in state.parts() if isinstance(part, TokenCache)]


def _fixed(state: State) -> list[WindowCache | RecurrentState]:
    return [part for part in state.parts() if not isinstance(part, TokenCache)]


def _taken(part: WindowCache | RecurrentState, row: int, length: int) -> tuple[torch.Tensor | None, ...]:
    if isinstance(part, RecurrentState):
        return tuple(None if x is None else x[row].clone() for x in (part.memory, part.carried))
    n = min(length, part.window - 1)
    if part.static:  # a ring
        place = torch.arange(length - n, length, device=part.rows.device) % part.rows.shape[1]
        return (part.rows[row, place],)
    return (part.rows[row, part.rows.shape[1] - n :].clone(),)


def _join(part: WindowCache | RecurrentState, found: list[tuple | None]) -> None:
    """Set the tensors of a part that is not static; None: of a row that has seen no token."""
    if isinstance(part, RecurrentState):
        filled = next(tensors for tensors in found if tensors is not None)
        part.memory, part.carried = (
            None
            if like is None
            else torch.stack([torch.zeros_like(like) if tensors is None else tensors[i] for tensors in found])
            for i, like in enumerate(filled)
        )
        return
    held = [None if tensors is None else tensors[0] for tensors in found]
    longest = max((x for x in held if x is not None), key=len)
    part.rows = longest.new_zeros(len(held), *longest.shape)
    for row, tokens in zip(part.rows, held, strict=True):
        if tokens is not None:
            row[len(row) - len(tokens) :] = tokens


def _put(part: WindowCache | RecurrentState, index: int, tensors: tuple, length: int) -> None:
    if isinstance(part, RecurrentState):
        for own, new in zip((part.memory, part.carried), tensors, strict=True):
            if own is not None:
                own[index] = new
        return
    (tokens,) = tensors
    place = torch.arange(length - len(tokens), length, device=tokens.device) % part.rows.shape[1]
    part.rows[index] = 0
    part.rows[index, place] = tokens
