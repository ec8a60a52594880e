"""One optimizer step."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fusedlm.distributed import World, local
from fusedlm.model.layer_metrics import end_step
from fusedlm.model.low_precision import cast_weights
from fusedlm.model.sharding import begin_backward, squared_norm, sum_whole_gradients
from fusedlm.optim import set_learning_rates, step_if
from fusedlm.train.cuda_graph import CapturedBackward
from fusedlm.train.micro_batch import forward_backward


@dataclass(frozen=True)
class StepResult:
    """The results of one step, over all processes."""

    loss: float  # nats per valid target token, times their weight beside soft targets
    layer_losses: dict[str, float]  # losses of layers by name, not included in `loss`
    grad_norm: float  # of all gradients, before clipping
    skipped: bool  # a loss or the gradient norm was not finite; parameters and optimizer are unchanged
    metrics: dict[str, torch.Tensor]  # summed over the step, on the CPU


def backward(
    model: nn.Module,
    batch,
    micro_batch_size: int,
    autocast: Callable[[], AbstractContextManager],
    *,
    captured: CapturedBackward | None = None,
    teacher=None,
    world: World | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Accumulate the gradient of the mean loss over the valid targets of the full batch.

    Every micro-batch is divided by the number of valid targets of all micro-batches and processes, which is known
    before the first forward pass, so that all tokens have the same weight. Losses of layers that are means over
    sequences are weighted by the micro-batch's fraction of the sequences.

    Args:
        batch: a `fusedlm.data.Batch`, this process's part.
        micro_batch_size: sequences per forward pass.
        autocast: gives the context of each forward pass.
        captured: runs forward and backward as one CUDA graph; for batches without documents, and without a teacher.
        teacher: as for `forward_backward`.
        world: the processes that share the batch; None: this process alone.

    Returns:
        The losses and the metrics of this process, summed over its micro-batches, on the device. Gradients of sharded
        parameters are summed over the processes, those of others are this process's.
    """
    world = world or World()
    cast_weights(model)  # after the update, in the memory that a graph reads
    if captured is not None:
        captured.begin_step()
    # Infinite if there is no valid target: then the loss is not finite and the step is skipped.
    n_valid = torch.full((), batch.n_valid, dtype=torch.float64, device=batch.tokens.device)
    loss_weight = world.sum(n_valid).reciprocal()
    losses: dict[str, torch.Tensor] = {}
    metrics: dict[str, torch.Tensor] = {}
    for start in range(0, len(batch.tokens), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        tokens, targets = batch.tokens[rows], batch.targets[rows]
        batch_weight = len(tokens) / (len(batch.tokens) * world.size)
        begin_backward(model, is_last=start + micro_batch_size >= len(batch.tokens))
        if captured is not None:
            output = captured(tokens, targets, loss_weight, batch_weight)
        else:
            documents = None if batch.documents is None else batch.documents[rows]
            options = {"loss_weight": loss_weight, "batch_weight": batch_weight, "teacher": teacher}
            output = forward_backward(model, tokens, documents, targets, autocast=autocast, **options)
        for sums, found in ((losses, output.losses), (metrics, output.metrics)):
            for name, value in found.items():
                # Cloned, since a graph overwrites its outputs at the next replay.
                sums[name] = value.clone() if name not in sums else sums[name] + value
    return losses, metrics


def _over_processes(
    gradients: list[torch.Tensor], losses: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor], world: World
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The norm of all gradients, and losses and metrics summed over the processes, in one exchange: every process gets
    the same bits, and so decides alike what is clipped and whether the step is skipped."""
    if world.size == 1:
        return torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients]), losses, metrics
    square, *sums = world.sum_all([squared_norm(gradients, world), *losses.values(), *metrics.values()])
    norm = square.sqrt().to(gradients[0].dtype)
    losses = dict(zip(losses, sums, strict=False))
    return norm, losses, dict(zip(metrics, sums[len(losses) :], strict=True))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch,
    *,
    lr_scale: float,
    micro_batch_size: int,
    grad_clip: float | None,
    autocast: Callable[[], AbstractContextManager],
    captured: CapturedBackward | None = None,
    weights: Callable[[], AbstractContextManager] = nullcontext,
    teacher=None,
    world: World | None = None,
) -> StepResult:
    """Forward, backward, clipping by the norm of all gradients, update; then layers may use the metrics of the step.

    The host waits for the device once, and more often with layers that wait for it and optimizers that are not fused.

    Args:
        lr_scale: multiplies the peak learning rate of each parameter group.
        grad_clip: largest norm of all gradients; None: no clipping.
        batch, micro_batch_size, autocast, captured, teacher, world: as for `backward`.
        weights: gives the context of all passes, in which parameters may have other values; they are updated with the
            gradients of these.
    """
    world = world or World()
    options = {"captured": captured, "teacher": teacher, "world": world}
    with weights():
        losses, metrics = backward(model, batch, micro_batch_size, autocast, **options)
    sum_whole_gradients(model, world)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm, losses, metrics = _over_processes(gradients, losses, metrics, world)
    if grad_clip is not None:
        factor = (grad_clip / (norm + 1e-6)).clamp(max=1.0)  # as of torch.nn.utils.clip_grads_with_norm_
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    numbers = torch.stack([norm.float(), *(loss.float() for loss in losses.values())])
    set_learning_rates(optimizer, lr_scale)
    finite = numbers.isfinite().all()
    step_if(optimizer, finite)
    end_step(model, metrics, finite)
    # Read after the update was queued, so that the device keeps working while the host waits.
    counts = [metric.flatten().double() for metric in metrics.values()]
    norm_value, *values = torch.cat([numbers.double(), *counts]).tolist()
    loss_values = dict(zip(losses, values, strict=False))
    counted = torch.tensor(values[len(losses) :], dtype=torch.float64)
    sizes = [metric.numel() for metric in metrics.values()]
    metrics = {
        name: part.view(metric.shape).to(metric.dtype)
        for (name, metric), part in zip(metrics.items(), counted.split(sizes), strict=True)
    }
    if captured is None:  # a graph writes the next gradients into the same memory
        optimizer.zero_grad(set_to_none=True)
    skipped = not (math.isfinite(norm_value) and all(map(math.isfinite, loss_values.values())))
    loss = loss_values.pop("nll")
    return StepResult(loss, loss_values, norm_value, skipped=skipped, metrics=metrics)
