"""Caches of past tokens, the state of softmax mixers. The context says how many tokens each row of the batch has
seen."""

import torch

from fusedlm.nn.context import Context
from fusedlm.ops.common import runs_fused


class TokenCache:
    """All earlier tokens, (B, S, ...): row b has as many valid entries as it has seen tokens, and what follows them is
    never read. Reserved for max_tokens it is filled in place; otherwise it grows with each append.

    Rollback needs no work: the decoder reports fewer tokens, and later appends overwrite the rest.
    """

    spare = 0  # see WindowCache

    def __init__(self, max_tokens: int | None = None):
        self.max_tokens = max_tokens
        self.rows: torch.Tensor | None = None

    def append(self, new: torch.Tensor, context: Context) -> torch.Tensor:
        """Write (B, T, ...) after each row's tokens; returns (B, S, ...), oldest first, S = context.past + T.

        Raises:
            ValueError: there is no room.
        """
        end = context.past + new.shape[1]
        if self.max_tokens is not None and end > self.max_tokens:
            raise ValueError(f"the state has room for max_tokens={self.max_tokens}, not {end}; ask init_state for more")
        if context.slots_B is not None:
            write(self.rows, context.slots_B, new)
            return self.rows
        if context.starts_B is not None:
            return self._append_ragged(new, context.starts_B, end)
        return self._append_aligned(new, context.past)

    def _append_aligned(self, new: torch.Tensor, past: int) -> torch.Tensor:
        if self.max_tokens is None:
            # Cloned: a view would keep the full projection alive.
            self.rows = new.clone() if not past else torch.cat([self.rows[:, :past], new], dim=1)
            return self.rows
        self._reserve(new, self.max_tokens)
        end = past + new.shape[1]
        self.rows[:, past:end] = new
        return self.rows[:, :end]

    def _append_ragged(self, new: torch.Tensor, starts_B: torch.Tensor, end: int) -> torch.Tensor:
        self._reserve(new, end if self.max_tokens is None else self.max_tokens)
        index = starts_B[:, None] + torch.arange(new.shape[1], device=new.device)
        batch = torch.arange(new.shape[0], device=new.device)[:, None]
        self.rows[batch, index] = new
        return self.rows[:, :end]

    def visible(self, context: Context) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """starts_B and visible_before_BT of attention to what `append` returned."""
        return context.starts_B, context.visible_before()

    def make_static(self, capacity: int, lengths_B: torch.Tensor, spare: int = 0) -> None:
        """See `State.make_static`. lengths_B: tokens of each row."""
        self.rows = _resized(self.rows, capacity)
        self.max_tokens = capacity

    def load(self, other: "TokenCache", lengths_B: torch.Tensor) -> None:
        """Replace the contents by those of a cache that is not static, whose rows have lengths_B tokens."""
        n = min(self.rows.shape[1], other.rows.shape[1])
        self.rows[:, :n] = other.rows[:, :n]

    def _reserve(self, new: torch.Tensor, n_tokens: int) -> None:
        held = 0 if self.rows is None else self.rows.shape[1]
        if held < n_tokens:
            # Zeros: in a batch of rows of different lengths, masked positions are multiplied by a weight of 0.
            room = new.new_zeros(new.shape[0], n_tokens - held, *new.shape[2:])
            self.rows = room if self.rows is None else torch.cat([self.rows, room], dim=1)

    def extend_to(self, n_tokens: int, held: int) -> None:
        """Fill up to n_tokens in every row by repeating the `held` ones, so that size and speed at that length can be
        measured without computing the tokens."""
        if self.rows is None or held == 0:
            raise ValueError("an empty cache has no rows to repeat; feed it a token first")
        while held < n_tokens:
            n = min(held, n_tokens - held)
            self._append_aligned(self.rows[:, :n].clone(), held)
            held += n

    def mark(self) -> None:
        """Rollback needs nothing."""

    def rollback(self, kept: list[torch.Tensor] | None) -> None:
        """See WindowCache. The decoder's count of tokens is all that changes."""

    def tensors(self) -> list[torch.Tensor]:
        return [] if self.rows is None else [self.rows]


class WindowCache:
    """The window - 1 tokens that the next one can still see, (B, at most window - 1, ...), each row's newest last. Rows
    that have seen fewer tokens hold unused entries first, which no query sees.

    Static, it is a ring of window + spare tokens, in which the token at position p has place p % (window + spare): the
    tokens that the next one sees are still there when the last `spare` ones are taken back."""

    def __init__(self, window: int):
        self.window, self.spare, self.static = window, 0, False
        self.rows: torch.Tensor | None = None
        self._before: torch.Tensor | None = None  # rows when the mark was set
        self._since: list[torch.Tensor] | None = None  # what was appended after a mark; None: there is none

    def append(self, new: torch.Tensor, context: Context) -> torch.Tensor:
        """Append (B, T, ...); returns (B, S, ...), the earlier and the new tokens, oldest first unless static."""
        if self.spare:
            return self._append_to_ring(new, context.starts_B)
        if context.slots_B is not None:
            rows_B = torch.arange(len(new), device=new.device)
            write(self.rows, rows_B * self.window + context.starts_B % self.window, new)
            return self.rows
        if self._since is not None:
            self._since.append(new.clone())
        if context.past == 0:
            self.rows = None  # after a rollback to length 0 they belong to no row
        return self._shift_in(new, context.lengths_B)

    def _append_to_ring(self, new: torch.Tensor, starts_B: torch.Tensor) -> torch.Tensor:
        """Returns the tokens that these see, in order: the ring holds older ones too, which no mask of attention could
        leave out where they are."""
        n_tokens, size = new.shape[1], self.rows.shape[1]
        rows_B1 = torch.arange(len(new), device=new.device)[:, None]
        seen = starts_B[:, None] + torch.arange(1 - self.window, n_tokens, device=new.device)
        self.rows[rows_B1, seen[:, self.window - 1 :] % size] = new
        return self.rows[rows_B1, seen % size]

    def visible(self, context: Context) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See TokenCache. Rows end with the newest token, whatever their length; in the ring, the order does not matter
        and tokens beyond a row's length are after its own."""
        if context.slots_B is not None and not self.spare:
            return context.starts_B.clamp(max=self.window - 1), None
        return None, context.visible_before(self.window)

    def make_static(self, capacity: int, lengths_B: torch.Tensor, spare: int = 0) -> None:
        """See TokenCache."""
        if not self.static:
            self.static, self.spare = True, spare
            self.rows = self._ring(self.rows, lengths_B)

    def load(self, other: "WindowCache", lengths_B: torch.Tensor) -> None:
        """See TokenCache."""
        self.rows.copy_(self._ring(other.rows, lengths_B))

    def _ring(self, rows: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        n = rows.shape[1]
        position = lengths_B[:, None] - n + torch.arange(n, device=rows.device)
        batch = torch.arange(len(rows), device=rows.device)[:, None]
        size = self.window + self.spare
        ring = rows.new_zeros(len(rows), size, *rows.shape[2:])
        ring[batch, position % size] = rows  # of positions below 0: to places that are not visible yet
        return ring

    def _shift_in(self, new: torch.Tensor, n_new_B: torch.Tensor | None) -> torch.Tensor:
        seen = new if self.rows is None else torch.cat([self.rows, new], dim=1)
        keep = min(seen.shape[1], self.window - 1)
        if n_new_B is None:
            self.rows = seen[:, seen.shape[1] - keep :].clone()
        else:
            first_B = seen.shape[1] - new.shape[1] + n_new_B - keep
            index = (first_B[:, None] + torch.arange(keep, device=new.device)).clamp(min=0)
            self.rows = seen[torch.arange(len(seen), device=new.device)[:, None], index]
        return seen

    def extend_to(self, n_tokens: int, held: int) -> None:
        """See TokenCache."""
        if self.rows is None or held == 0:
            raise ValueError("an empty cache has no rows to repeat; feed it a token first")
        while self.rows.shape[1] < cached_tokens(n_tokens, self.window):
            n = min(self.rows.shape[1], cached_tokens(n_tokens, self.window) - self.rows.shape[1])
            self.rows = torch.cat([self.rows, self.rows[:, :n]], dim=1)

    def mark(self) -> None:
        """From now on save what `rollback` needs; a ring has it."""
        if not self.static:
            self._before, self._since = self.rows, []

    def rollback(self, kept: list[torch.Tensor] | None) -> None:
        """Keep only the first kept[i][b] tokens of the i-th append since the mark in row b; None: keep all."""
        since, self._since = self._since, None
        if kept is not None and not self.static:
            self.rows = self._before
            for new, n_kept_B in zip(since, kept, strict=True):
                self._shift_in(new, n_kept_B)
        self._before = None

    def tensors(self) -> list[torch.Tensor]:
        return [] if self.rows is None else [self.rows]


def fuses_append(context: Context, backend: str, like: torch.Tensor) -> bool:
    """Whether one op rotates the token of each row of a static state and writes it into the `rows` of its caches."""
    one_token = context.slots_B is not None and context.slots_B.dim() == 1
    return one_token and not torch.is_grad_enabled() and runs_fused("rope_append", backend, like)


def write(rows_BS: torch.Tensor, slots_BT: torch.Tensor, new_BT: torch.Tensor) -> None:
    """Write tokens (B, T, ...) into (B, S, ...) at places among its B * S, (B, T), or (B,) of one token per row."""
    rows_BS.flatten(0, 1).index_copy_(0, slots_BT.flatten(), new_BT.flatten(0, 1))


def _resized(rows: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Exactly n_tokens per row, zeros where there were none."""
    if rows.shape[1] == n_tokens:
        return rows.contiguous()
    resized = rows.new_zeros(len(rows), n_tokens, *rows.shape[2:])
    n = min(rows.shape[1], n_tokens)
    resized[:, :n] = rows[:, :n]
    return resized


def cached_tokens(n_tokens: int, window: int | None) -> int:
    """Tokens that a cache holds after n_tokens; window None: of a TokenCache."""
    return n_tokens if window is None else min(n_tokens, window - 1)
