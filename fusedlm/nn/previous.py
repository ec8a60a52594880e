"""The value of the token before each, within its document."""

import torch

from fusedlm.nn.cache import WindowCache
from fusedlm.nn.context import Context


class PreviousToken(WindowCache):
    """The state of what reads the token before: the newest value of each row, in static states the newest two."""

    def __init__(self):
        super().__init__(window=2)

    def before(self, new_BT: torch.Tensor, context: Context) -> torch.Tensor:
        """Append (B, T, ...); returns the value before each, (B, T, ...), meaningless for a row's first token."""
        rows = self.append(new_BT, context)
        if context.slots_B is not None and not self.spare:
            place_B = (context.starts_B + 1) % self.window  # the one that was not written now
            index = place_B.view(-1, *[1] * (rows.dim() - 1)).expand(-1, 1, *rows.shape[2:])
            return rows.gather(1, index)
        return rows[:, :-1] if rows.shape[1] > new_BT.shape[1] else shifted(rows)


def shifted(new_BT: torch.Tensor) -> torch.Tensor:
    """(B, T, ...) one token later, zeros first."""
    return torch.cat([torch.zeros_like(new_BT[:, :1]), new_BT[:, :-1]], dim=1)


def previous(new_BT: torch.Tensor, context: Context, state: PreviousToken | None) -> torch.Tensor:
    """The value of the token before each, (B, T, ...), 0 for the first token of a document."""
    before = shifted(new_BT) if state is None else state.before(new_BT, context)
    first_BT = context.positions_BT == 0
    return before.masked_fill(first_BT.view(*first_BT.shape, *[1] * (new_BT.dim() - 2)), 0)
