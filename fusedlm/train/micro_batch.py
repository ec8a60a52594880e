"""Forward and backward of one micro-batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from fusedlm.model import Output
from fusedlm.nn.soft_targets import SoftTargets


def forward_backward(
    model: nn.Module,
    tokens: torch.Tensor,
    documents: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    loss_weight: torch.Tensor,
    batch_weight: torch.Tensor | float,
    autocast: Callable[[], AbstractContextManager],
    teacher: Callable[[torch.Tensor, torch.Tensor | None], SoftTargets] | None = None,
) -> Output:
    """Forward and backward of one micro-batch; the gradients are added to the parameters.

    Args:
        tokens, documents, targets, loss_weight, batch_weight: as `Decoder.forward` takes them.
        autocast: gives the context of the forward pass.
        teacher: gives the soft targets of tokens and documents; None: there are none.

    Returns:
        The output, with detached losses.
    """
    options = {"loss_weight": loss_weight, "batch_weight": batch_weight}
    with autocast():
        if teacher is not None:
            options["soft_targets"] = teacher(tokens, documents)
        output = model(tokens, documents=documents, targets=targets, **options)
    output.total().backward()
    return output._replace(losses={name: loss.detach() for name, loss in output.losses.items()})
