"""Rows of a tensor that processes send each other, with gradients that go back the same way."""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def exchange_rows(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """All-to-all of rows. Differentiable: gradients of rows that were received go back to where they came from.

    All processes of the group call this, and if rows of one of them need gradients, those of all must, since the
    backward pass exchanges too. `exchange_rows(exchange_rows(x, a, b, group), b, a, group)` is x.

    Args:
        rows: (sum(sent), ...), those for each process of the group one after another.
        sent: how many go to each process of the group.
        received: how many come from each.

    Returns:
        (sum(received), ...), by the process that they come from.
    """
    return _Exchange.apply(rows, sent, received, group)


def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
