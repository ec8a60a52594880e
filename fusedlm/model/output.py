"""The output of a forward pass of the decoder."""

from typing import NamedTuple

import torch


class Output(NamedTuple):
    """A pytree, so that wrappers see the tensors in it.

    logits: (B, T, vocab_size), or of a selection (n, vocab_size), float32 or better; None where targets were given.
    nll: nats of each target, (B, T) or (n,), 0 where the target is -100, without a gradient; None without targets.
    losses: () each, by name, weighted and normalised: their sum is what is differentiated. `nll` is that of the
        targets, the others are those of layers and of multi-token prediction and are there while training.
    metrics: counts and sums by name, without a gradient, stacked over the layers that report one, shorter ones filled
        up with zeros; they add up over micro-batches and ranks.
    hidden: (B, T, dim), the output of the last block, also with a selection; None where it was not requested.
    """

    logits: torch.Tensor | None
    nll: torch.Tensor | None
    losses: dict[str, torch.Tensor]
    metrics: dict[str, torch.Tensor]
    hidden: torch.Tensor | None = None

    def total(self) -> torch.Tensor:
        """() sum of all losses, in the dtype of the first."""
        total, *others = self.losses.values()
        for loss in others:
            total = total + loss.to(total.dtype)
        return total
