"""Orthogonalisation of matrices that are sharded by rows: each is sent to one process and comes back.

Every process sends the rows it has of each matrix to the matrix's owner (one all-to-all), the owners orthogonalise full
matrices, and the rows go back the same way. Copies of the model divide the matrices among themselves, and then exchange
the results. Per step a process sends and receives about twice the elements of its shard, and does its fraction of the
products.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from fusedlm.distributed import local
from fusedlm.optim.shards import Piece, Place, owners, piece_of
from fusedlm.optim.stacks import Part

Alike = tuple[int, int, int]  # rows of a matrix, those of them that the process holds, columns
Views = dict[int, list[tuple[Piece, torch.Tensor]]]  # by matrix its pieces, and where they are in a buffer


class MatrixExchange:
    """The exchange of some matrices, planned once.

    Args:
        parts: of DTensors on one mesh; all processes that hold their rows give the same ones in the same order.
        place: of this process.
    """

    def __init__(self, parts: list[Part], place: Place):
        self.parts, self.place = parts, place
        self.pieces = [piece_of(part, place.shard, place.n_shards) for part in parts]
        found = [divmod(owner, place.n_shards) for owner in owners(parts, place.n_copies * place.n_shards)]
        # The matrices that each copy deals with, by owner: buffers hold their rows in this order.
        self._of_copy = [
            sorted((i for i, (copy, _) in enumerate(found) if copy == c), key=lambda i: (found[i][1], i))
            for c in range(place.n_copies)
        ]
        own = self._of_copy[place.copy]
        self._owned = [i for i in own if found[i][1] == place.shard]
        self._sent = [sum(self._size(i) for i in own if found[i][1] == shard) for shard in range(place.n_shards)]
        # Of the matrices of this process, the rows that each process of its copy has.
        self._received = [[piece_of(parts[i], q, place.n_shards) for i in self._owned] for q in range(place.n_shards)]
        # Matrices of which this process has rows.
        self.alike: dict[Alike, list[int]] = {}
        for i, (part, piece) in enumerate(zip(parts, self.pieces, strict=True)):
            if piece.rows:
                self.alike.setdefault((part.rows, piece.rows, self._columns(i)), []).append(i)
        self._indices: dict[Alike, torch.Tensor] = {}

    def index_of(self, key: Alike) -> torch.Tensor:
        """The indices of those matrices on the device, copied there once: a copy waits for the device."""
        if key not in self._indices:
            self._indices[key] = torch.tensor(self.alike[key], device=local(self.parts[0].parameter).device)
        return self._indices[key]

    def _columns(self, index: int) -> int:
        return self.parts[index].parameter.shape[-1]

    def _size(self, index: int) -> int:
        return self.pieces[index].rows * self._columns(index)

    def orthogonalize(
        self, rows: list[torch.Tensor], dtype: torch.dtype, polynomial: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """The process's rows of each matrix orthogonalised, (rows, columns) in `dtype`, in the order of `parts`.

        Args:
            rows: the process's rows of each matrix.
            dtype: in which they are sent.
            polynomial: orthogonalises a stack (matrices, rows, columns).
        """
        buffer = _packed([rows[i] for i in self._of_copy[self.place.copy]], dtype, rows[0].device)
        received = [
            sum(piece.rows * self._columns(i) for i, piece in zip(self._owned, pieces, strict=True))
            for pieces in self._received
        ]
        incoming = self._all_to_all(buffer, self._sent, received)
        self._solve(incoming, polynomial)
        buffer = self._all_to_all(incoming, received, self._sent)
        found: list[torch.Tensor] = [None] * len(self.parts)
        for members, values in zip(self._of_copy, self._of_all_copies(buffer), strict=True):
            parts = values.split([self._size(i) for i in members])
            for i, part in zip(members, parts, strict=True):
                found[i] = part.view(-1, self._columns(i))
        return found

    def _all_to_all(self, buffer: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        if self.place.shards is None:
            return buffer
        out = buffer.new_empty(sum(received))
        dist.all_to_all_single(out, buffer, received, sent, group=self.place.shards)
        return out

    def _solve(self, incoming: torch.Tensor, polynomial: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Orthogonalise this process's matrices in the buffer, those of one shape in one stack."""
        views: Views = {i: [] for i in self._owned}
        start = 0
        for pieces in self._received:
            for i, piece in zip(self._owned, pieces, strict=True):
                size = piece.rows * self._columns(i)
                if size:
                    views[i].append((piece, incoming[start : start + size].view(piece.rows, -1)))
                start += size
        shapes: dict[tuple[int, int], list[int]] = {}
        for i in self._owned:
            shapes.setdefault((self.parts[i].rows, self._columns(i)), []).append(i)
        for shape, members in shapes.items():
            stack = incoming.new_empty(len(members), *shape)
            rows = [view for i in members for _, view in views[i]]
            torch._foreach_copy_(_rows_of(stack, members, views), rows)
            torch._foreach_copy_(rows, _rows_of(polynomial(stack), members, views))

    def _of_all_copies(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The buffers of every copy, for this process's shard."""
        if self.place.copies is None:
            return [buffer]
        sizes = [sum(map(self._size, members)) for members in self._of_copy]
        if not max(sizes):
            return [buffer] * len(sizes)
        padded = buffer.new_zeros(max(sizes))  # an all-gather takes equal sizes
        padded[: len(buffer)] = buffer
        gathered = list(buffer.new_empty(len(sizes), len(padded)))
        dist.all_gather(gathered, padded, group=self.place.copies)
        return [part[:size] for part, size in zip(gathered, sizes, strict=True)]


def _rows_of(stack: torch.Tensor, members: list[int], views: Views) -> list[torch.Tensor]:
    """The rows in a stack of the pieces of its matrices."""
    return [
        matrix[piece.first : piece.first + piece.rows]
        for matrix, i in zip(stack, members, strict=True)
        for piece, _ in views[i]
    ]


def _packed(rows: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    sizes = [part.numel() for part in rows]
    buffer = torch.empty(sum(sizes), dtype=dtype, device=device)
    pairs = [(view.view_as(part), part) for view, part in zip(buffer.split(sizes), rows, strict=True) if part.numel()]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
    return buffer
