"""A growing record of past tokens, the state of softmax mixers."""

import torch


class TokenCache:
    """Rows of earlier tokens. Reserved for max_tokens it is filled in place; otherwise it grows by what is appended.

    With a window it holds the window - 1 tokens that the next one can still see.
    """

    def __init__(self, max_tokens: int | None = None, window: int | None = None):
        self.max_tokens = max_tokens
        self.window = window
        self.length = 0  # tokens held
        self.rows: torch.Tensor | None = None

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Take (B, n, ...) and return (B, S, ...), everything held before and the new, oldest first."""
        if self.window is not None:
            seen = new if self.rows is None else torch.cat([self.rows, new], dim=1)
            keep = min(seen.shape[1], self.window - 1)
            self.rows, self.length = seen[:, seen.shape[1] - keep :].clone(), keep
            return seen
        if self.max_tokens is None:
            # The first rows are cloned: as a view they would keep the whole projection that they were cut from alive.
            self.rows = new.clone() if self.rows is None else torch.cat([self.rows, new], dim=1)
            self.length = self.rows.shape[1]
            return self.rows
        end = self.length + new.shape[1]
        if end > self.max_tokens:
            raise ValueError(f"the state has room for max_tokens={self.max_tokens}, not {end}; ask init_state for more")
        if self.rows is None:
            self.rows = new.new_empty(new.shape[0], self.max_tokens, *new.shape[2:])
        self.rows[:, self.length : end] = new
        self.length = end
        return self.rows[:, :end]

    def extend_to(self, n_tokens: int) -> None:
        """Stand as after n_tokens, with the rows held so far repeated: what is held at that length can then be
        measured without computing it."""
        target = cached_tokens(n_tokens, self.window)
        if self.rows is None or self.length == 0:
            raise ValueError("an empty cache has no rows to repeat; feed it a token first")
        while self.length < target:
            self._repeat(min(self.length, target - self.length))

    def _repeat(self, n: int) -> None:
        held = self.rows[:, : self.length]
        if self.window is not None:
            self.rows, self.length = torch.cat([held, held[:, :n]], dim=1), self.length + n
        else:
            self.append(held[:, :n].clone())

    def tensors(self) -> list[torch.Tensor]:
        return [] if self.rows is None else [self.rows]


def cached_tokens(n_tokens: int, window: int | None) -> int:
    """Tokens that a TokenCache holds after n_tokens."""
    return n_tokens if window is None else min(n_tokens, window - 1)
