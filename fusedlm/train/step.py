"""One optimizer step."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from fusedlm.model.auxiliary import Routing, RoutingTally, auxiliary_loss
from fusedlm.optim import update_if
from fusedlm.train.cuda_graph import CapturedBackward


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats a valid target token
    grad_norm: float  # of the whole gradient, before clipping
    skipped: bool  # loss or gradient norm was not finite, and parameters and optimizer are as they were
    routing: Routing | None = None  # of the batch; None: the model has no routed feed-forward


def backward(
    model: nn.Module,
    batch,
    micro_batch_size: int,
    autocast: Callable[[], AbstractContextManager],
    tally: RoutingTally | None = None,
    captured: CapturedBackward | None = None,
) -> torch.Tensor:
    """Accumulate the gradient of the mean over the valid targets of the whole batch, micro-batch by micro-batch.

    Every micro-batch is divided by the same count, known on the host before the first forward pass, so that a token
    weighs the same wherever it stands. Auxiliary losses of the model are not linear in the tokens: theirs is the mean
    over the micro-batches, each weighing as its rows; it enters the gradient and not the loss.

    Args:
        tally: counts each forward pass.
        captured: runs forward and backward as one graph; for batches without documents and models without auxiliary
            loss.

    Returns:
        The loss () float32 on the device, nats a valid target.
    """
    total = None
    if captured is not None:
        captured.begin_step()
    # Without a valid target infinite, so that the loss is not finite and the step is skipped.
    weight = torch.full((), batch.n_valid, dtype=torch.float64, device=batch.tokens.device).reciprocal()
    for start in range(0, len(batch.tokens), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        if captured is not None:
            loss = captured(batch.tokens[rows], batch.targets[rows], batch.n_valid)
            total = loss.clone() if total is None else total + loss
            continue
        documents = None if batch.documents is None else batch.documents[rows]
        with autocast():
            loss = model.weighted_loss(batch.tokens[rows], batch.targets[rows], weight, documents)
        auxiliary = auxiliary_loss(model)
        if auxiliary is None:
            loss.backward()
        else:
            (loss + auxiliary * (len(batch.tokens[rows]) / len(batch.tokens))).backward()
        if tally is not None:
            tally.add()
        total = loss.detach() if total is None else total + loss.detach()
    return total


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch,
    *,
    lr: float,
    micro_batch_size: int,
    grad_clip: float | None,
    autocast: Callable[[], AbstractContextManager],
    captured: CapturedBackward | None = None,
) -> StepResult:
    """Forward, backward, clipping by the norm of the whole gradient, update. The host waits for the device once, and
    routed feed-forwards wait for the number of their tokens."""
    tally = RoutingTally(model)
    loss = backward(model, batch, micro_batch_size, autocast, tally, captured)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    results = torch.stack([loss.float(), norm.float()])
    for group in optimizer.param_groups:
        group["lr"] = lr
    update_if(optimizer, results.isfinite().all())
    if tally:
        results = torch.cat([results.double(), tally.counts.flatten().double()])
    # Last, with the update already on its way: the device has nothing to wait for while the host does.
    loss_value, norm_value, *counts = results.tolist()
    finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    if captured is None:  # a graph writes the next gradients where these are
        optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_value, norm_value, skipped=not finite, routing=tally.result(counts) if tally else None)
