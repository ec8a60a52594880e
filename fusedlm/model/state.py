"""Decoding state: that of every mixer, the length of each row, and rollback."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fusedlm.nn.cache import TokenCache, WindowCache
from fusedlm.nn.context import Context
from fusedlm.nn.rope import RopeTable, YaRN, rope_table


@dataclass(frozen=True)
class Mark:
    """A point to roll back to, and what was appended since; from `State.mark`."""

    lengths: list[int]
    packed: bool
    next_position_B: torch.Tensor
    last_document_B: torch.Tensor
    # Of each append since: tokens of each row, and the position after each token and its document, (B, T).
    appended: list[tuple[list[int], torch.Tensor, torch.Tensor | None]] = field(default_factory=list)
    # Of a static state: its counters when the mark was set, and of each append tokens of each row and width.
    counters: torch.Tensor | None = None
    appended_static: list[tuple[torch.Tensor | int, int]] = field(default_factory=list)


class State:
    """The decoding state of a batch of sequences, which may differ in length.

    A static state (`make_static`) keeps all its tensors at fixed addresses and counts on the device, so that one-token
    steps, and appends of a few tokens with their rollback, can be captured in a CUDA graph.

    layers: what each mixer's `init_state` gave.
    inputs: the states of the parts before the first block, by name.
    lengths: tokens seen, of each row; of a static state those before it became static.
    next_position_B, last_document_B: (B,) int64, the next position and the number of each row's last document.
    capacity: most tokens of a row of a static state; None: it is not static.
    spare: most tokens per row between a mark and its rollback, of a static state.
    lengths_B: (B,) int64 tokens seen, of a static state.
    growing_B: (B,) int64, 1 for rows that keep the next token, 0 for rows that overwrite it with the one after; of a
        static state.
    """

    def __init__(self, layers: list, batch_size: int, device: torch.device, inputs: dict[str, WindowCache]):
        self.layers, self.inputs = layers, inputs
        self.lengths = [0] * batch_size
        self.packed = False
        self.next_position_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.last_document_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.capacity: int | None = None
        self.spare = 0
        self.lengths_B: torch.Tensor | None = None
        self.growing_B: torch.Tensor | None = None
        # Of a static state: lengths_B, next_position_B and slots, which advance together, (3, B).
        self._counters: torch.Tensor | None = None
        self._tables: dict[tuple, torch.Tensor] = {}
        self._mark: Mark | None = None

    @property
    def length(self) -> int:
        """Tokens seen, of the row that has the most."""
        return max(self.lengths)

    def past(self, n_tokens: int = 1) -> int:
        """Tokens before the next n_tokens, of the row that has the most; of a static state the most there can be, since
        shapes must not depend on lengths."""
        return self.length if self.capacity is None else self.capacity - n_tokens

    def starts(self) -> torch.Tensor | None:
        """(B,) int64 tokens seen; None where all rows have `length`."""
        if self.capacity is not None:
            return self.lengths_B
        if len(set(self.lengths)) == 1:
            return None
        return torch.tensor(self.lengths, device=self.next_position_B.device)

    def slots(self, n_tokens: int = 1) -> torch.Tensor | None:
        """(B,) int64 places of the next tokens among the B * capacity of a static cache, or (B, n_tokens) of several;
        None: not static."""
        if self.capacity is None:
            return None
        return self._counters[2] if n_tokens == 1 else self.next_of(self._counters[2], n_tokens)

    @staticmethod
    def next_of(first_B: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """(B, n_tokens) int64, consecutive numbers from those given."""
        first_B1 = first_B[:, None]
        return first_B1 if n_tokens == 1 else first_B1 + torch.arange(n_tokens, device=first_B.device)

    def _place(self) -> None:
        """Set the slots by the lengths."""
        rows_B = torch.arange(len(self.lengths), device=self.lengths_B.device)
        self._counters[2] = rows_B * self.capacity + self.lengths_B

    def rope(self, dim: int, base: float, dtype: torch.dtype, yarn: YaRN | None, n_tokens: int = 1) -> RopeTable:
        """`rope_table` of the next tokens of a static state: rows of a table of all its positions, which is computed at
        the first call."""
        key = (dim, base, dtype, yarn)
        if key not in self._tables:
            positions = torch.arange(self.capacity, device=self.lengths_B.device)
            self._tables[key] = torch.stack(rope_table(positions[None], dim, base, dtype, yarn))[:, 0]
        index = self.next_position_B if n_tokens == 1 else self.next_of(self.next_position_B, n_tokens).flatten()
        cos, sin = self._tables[key].index_select(1, index).unflatten(1, (-1, n_tokens))
        return cos, sin

    def check_static(self, n_tokens: int, lengths, documents_BT: torch.Tensor | None) -> None:
        """Raises:
        ValueError: a static state cannot take these tokens.
        """
        if self._mark is None:
            if n_tokens > 1 or lengths is not None or documents_BT is not None:
                raise ValueError("a static state takes one token per row, without lengths and documents")
            return
        if documents_BT is not None or not isinstance(lengths, torch.Tensor | None):
            raise ValueError("a static state takes no documents, and lengths as a tensor on its device")
        n_appended = n_tokens + sum(width for _, width in self._mark.appended_static)
        if n_appended > self.spare:
            raise ValueError(f"{n_appended} tokens since the mark are more than the spare={self.spare} of this state")

    def advance(
        self, context: Context, documents_BT: torch.Tensor | None, lengths: list[int] | torch.Tensor
    ) -> None:
        """Count an append of so many tokens per row; of a static state with a mark a tensor, or all."""
        if self.capacity is not None:
            if self._mark is None:
                self._counters += self.growing_B
            else:
                width = context.positions_BT.shape[1]
                n_new = lengths if isinstance(lengths, torch.Tensor) else width
                self._mark.appended_static.append((n_new, width))
                self._counters += n_new
            return
        after_BT = (context.positions_BT + 1).expand(len(lengths), -1)
        if self._mark is not None:
            self._mark.appended.append((lengths, after_BT, documents_BT))
        self.packed = context.packed
        self._follow(lengths, after_BT, documents_BT)

    def _follow(self, lengths: list[int], after_BT: torch.Tensor, documents_BT: torch.Tensor | None) -> None:
        self.lengths = [before + new for before, new in zip(self.lengths, lengths, strict=True)]
        if min(lengths) == after_BT.shape[1]:  # no row has padding
            self.next_position_B = after_BT[:, -1].clone()
            if documents_BT is not None:
                self.last_document_B = documents_BT[:, -1].clone()
            return
        n_B = torch.tensor(lengths, device=after_BT.device)
        last_B = (n_B - 1).clamp(min=0)[:, None]
        self.next_position_B = torch.where(n_B > 0, after_BT.gather(1, last_B)[:, 0], self.next_position_B)
        if documents_BT is not None:
            self.last_document_B = torch.where(n_B > 0, documents_BT.gather(1, last_B)[:, 0], self.last_document_B)

    def make_static(self, capacity: int, spare: int = 0) -> None:
        """Keep all tensors at fixed addresses from now on, with room for `capacity` tokens in every row. The state then
        takes one token per row at a time. Called again, it gives a static state more room; a graph captured before is
        then of no use.

        Args:
            spare: with a mark, so many tokens per row may be appended, any number at a time, before some are taken
                back; those must fit the capacity. 0: it takes no mark.

        Raises:
            ValueError: the state has a mark, documents, or no tokens, or the capacity is too small.
        """
        if self._mark is not None or self.packed or not min(self.lengths):
            why = (
                "has a mark"
                if self._mark is not None
                else "has documents"
                if self.packed
                else "has rows without tokens"
            )
            raise ValueError(f"a state that {why} cannot be static")
        least = self.length + 1 if self.capacity is None else self.capacity
        if capacity < least:
            raise ValueError(f"capacity={capacity} must be at least {least}")
        if self.capacity is None:
            lengths_B = torch.tensor(self.lengths, device=self.next_position_B.device)
            self._counters = torch.stack([lengths_B, self.next_position_B, lengths_B])
            self.lengths_B, self.next_position_B, _ = self._counters
            self.growing_B = torch.ones_like(self.lengths_B)
            self.spare = spare
        self.capacity = capacity
        self._tables = {}
        self._place()
        for part in self.parts():
            part.make_static(capacity, self.lengths_B, self.spare)

    def first_rows(self, n_rows: int) -> "State":
        """The first rows of this static state as a static state of their own, in the same memory. `make_static` of
        either one separates them."""
        if self.capacity is None or self._mark is not None or not 1 <= n_rows <= len(self.lengths):
            raise ValueError(f"n_rows={n_rows} of a static state without a mark must be from 1 to {len(self.lengths)}")
        layers = [
            [_first(part, n_rows) for part in layer] if isinstance(layer, list) else _first(layer, n_rows)
            for layer in self.layers
        ]
        inputs = {name: _first(part, n_rows) for name, part in self.inputs.items()}
        view = State(layers, n_rows, self.lengths_B.device, inputs)
        view.lengths, view.capacity, view.spare = self.lengths[:n_rows], self.capacity, self.spare
        view._counters = self._counters[:, :n_rows]
        view.lengths_B, view.next_position_B, _ = view._counters
        view.growing_B, view._tables = self.growing_B[:n_rows], self._tables
        return view

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set the tokens seen of every row of a static state, whose positions are those of one document. Rows without
        tokens need spare ones: a mark, after which the first tokens come together.

        Raises:
            ValueError: the state is not static, or a length does not fit it.
        """
        if self.capacity is None or len(lengths) != len(self.lengths):
            raise ValueError(f"lengths={list(lengths)} are for a static state of {len(lengths)} rows")
        least = 0 if self.spare else 1
        if not all(least <= length < self.capacity for length in lengths):
            raise ValueError(f"lengths={list(lengths)} must be at least {least} and below capacity={self.capacity}")
        self.lengths = list(lengths)
        self.lengths_B.copy_(torch.tensor(self.lengths))
        self.next_position_B.copy_(self.lengths_B)
        self._place()

    def load(self, other: "State") -> None:
        """Replace the contents of this static state by those of another, which is not static, in the same memory.

        Raises:
            ValueError: the states have different sizes, or the other has more tokens than this one has room for.
        """
        if self.capacity is None or other.capacity is not None or other.packed:
            raise ValueError("only a static state loads another one, which must be neither static nor have documents")
        if len(other.lengths) != len(self.lengths) or not 0 < min(other.lengths) <= other.length < self.capacity:
            raise ValueError(
                f"a static state of {len(self.lengths)} rows with capacity={self.capacity} cannot load rows of "
                f"{other.lengths} tokens"
            )
        self.lengths = list(other.lengths)
        self.lengths_B.copy_(torch.tensor(other.lengths))
        self._place()
        self.growing_B.fill_(1)
        self.next_position_B.copy_(other.next_position_B)
        for own, part in zip(self.parts(), other.parts(), strict=True):
            own.load(part, self.lengths_B)

    def mark(self) -> Mark:
        """Set a point to roll back to. One at a time: `rollback` or `release` it before the next.

        Raises:
            ValueError: a mark is set already, or the state is static without spare tokens.
        """
        if self.capacity is not None and not self.spare:
            raise ValueError("a static state without spare tokens cannot be rolled back, and takes no mark")
        if self._mark is not None:
            raise ValueError("this state has a mark already; roll back to it or release it first")
        counters = None if self.capacity is None else self._counters.clone()
        self._mark = Mark(
            list(self.lengths), self.packed, self.next_position_B, self.last_document_B, counters=counters
        )
        for part in self.parts():
            part.mark()
        return self._mark

    def rollback(self, mark: Mark, keep: int | Sequence[int] | torch.Tensor = 0) -> None:
        """Keep only the first tokens of what was appended since the mark.

        Args:
            mark: from `mark()`, not used yet.
            keep: tokens to keep, one number for all rows or one per row; of a static state (B,) int64 on its device,
                which is not waited for and not checked.

        Raises:
            ValueError: the mark is not the current one, or a row has fewer tokens to keep.
        """
        self._check(mark)
        if mark.counters is not None:
            self._rollback_static(mark, keep)
            return
        keep = self._keep_list(keep, mark)
        self._mark = None
        self.lengths, self.packed = list(mark.lengths), mark.packed
        self.next_position_B, self.last_document_B = mark.next_position_B, mark.last_document_B
        left, kept = list(keep), []
        for lengths, after_BT, documents_BT in mark.appended:
            taken = [min(a, b) for a, b in zip(left, lengths, strict=True)]
            left = [a - b for a, b in zip(left, taken, strict=True)]
            kept.append(torch.tensor(taken, device=after_BT.device))
            if any(taken):
                self.packed = self.packed or documents_BT is not None
                self._follow(taken, after_BT, documents_BT)
        for part in self.parts():
            part.rollback(kept)

    def _rollback_static(self, mark: Mark, keep_B: torch.Tensor) -> None:
        self._mark = None
        torch.add(mark.counters, keep_B, out=self._counters)
        left_B, kept = keep_B, []
        for n_new, _ in mark.appended_static:
            taken_B = left_B.clamp(max=n_new)
            left_B = left_B - taken_B
            kept.append(taken_B)
        for part in self.parts():
            part.rollback(kept)

    def release(self, mark: Mark) -> None:
        """Keep everything appended since the mark, and drop the mark.

        Raises:
            ValueError: the mark is not the current one.
        """
        self._check(mark)
        self._mark = None
        for part in self.parts():
            part.rollback(None)

    def _check(self, mark: Mark) -> None:
        if mark is not self._mark:
            raise ValueError("this mark is not the state's current one; it was used before, or is another state's")

    def _keep_list(self, keep, mark: Mark) -> list[int]:
        rows = len(self.lengths)
        keep = [keep] * rows if isinstance(keep, int) else [int(n) for n in keep]
        appended = [now - before for now, before in zip(self.lengths, mark.lengths, strict=True)]
        if len(keep) != rows or any(not 0 <= n <= most for n, most in zip(keep, appended, strict=False)):
            raise ValueError(f"keep={keep} must have a number for each of {rows} rows, from 0 to {appended}")
        return keep

    def nbytes(self) -> int:
        """Bytes of the live tensors of mixers and inputs."""
        return sum(tensor.untyped_storage().nbytes() for part in self.parts() for tensor in part.tensors())

    def extend_to(self, n_tokens: int) -> None:
        """Fill the caches up to n_tokens by repeating their rows: bytes and speed of decoding at a length do not depend
        on the tokens, and can be measured without computing them.

        Raises:
            ValueError: the state has seen more tokens, or none, or its rows differ in length.
        """
        if len(set(self.lengths)) > 1:
            raise ValueError(f"the rows of the state have different lengths {self.lengths}")
        if n_tokens < self.length:
            raise ValueError(f"the state has seen {self.length} tokens, which is more than {n_tokens}")
        for part in self.parts():
            if isinstance(part, TokenCache | WindowCache):
                part.extend_to(n_tokens, self.length)
        self.next_position_B = self.next_position_B + (n_tokens - self.length)
        self.lengths = [n_tokens] * len(self.lengths)

    def parts(self) -> list:
        """The states of inputs and mixers, in a fixed order."""
        layers = [part for layer in self.layers for part in (layer if isinstance(layer, list) else [layer])]
        return [*self.inputs.values(), *layers]


def _first(part, n_rows: int):
    """A part with the first rows of its tensors."""
    view = copy.copy(part)
    for name in ("rows", "memory", "carried"):
        if getattr(part, name, None) is not None:
            setattr(view, name, getattr(part, name)[:n_rows])
    return view
