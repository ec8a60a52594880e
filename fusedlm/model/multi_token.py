"""The loss of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, equations 21 to 25)."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.mtp import PredictionModule, later, later_targets
from fusedlm.nn.report import Report

if TYPE_CHECKING:
    from fusedlm.model.decoder import Decoder


def prediction_modules(depth: int, *, first_layer: int, **block) -> torch.nn.ModuleList:
    """Modules 1 to depth. block: arguments of `PredictionModule`, less the layer."""
    return torch.nn.ModuleList(PredictionModule(layer=first_layer + k, **block) for k in range(depth))


def multi_token_loss(
    model: "Decoder",
    hidden_BTD: torch.Tensor,
    embedded_BTD: torch.Tensor,
    context: Context,
    targets: torch.Tensor,
    loss_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, list[Report]]:
    """mtp_weight * sum over k of factor_k * nll_k, nll_k the sum of the nll of module k times loss_weight.

    Module k at position t reads the embedding of token t + k and predicts token t + k + 1, the target k places later.
    Like that of the model, the loss of each module is divided by the number of the model's targets, although a module
    has fewer. The head runs once per module: a fused one never holds the logits of one, and adds the gradients of its
    weight up as autograd does those of any weight that is used more than once.

    Args:
        hidden_BTD: the output of the last block.
        embedded_BTD: the embedding of the tokens, before anything is added.
        context: of the layers.
        targets, loss_weight: as `Decoder.forward` takes them.

    Returns:
        () the loss, and the report of each module.
    """
    targets_BT = _of_all(targets, hidden_BTD, context)
    if loss_weight is None:
        loss_weight = (targets_BT != -100).sum().clamp(min=1).double().reciprocal()
    embedded_BTD = model.cast(embedded_BTD * model.embedding_scale)
    rows_BTW = context.value_rows_BTW
    total, reports = None, []
    for k, (module, factor) in enumerate(zip(model.mtp, model.mtp_factors, strict=True), 1):
        own = context if rows_BTW is None else replace(context, value_rows_BTW=later(rows_BTW, k))
        hidden_BTD, report = module(hidden_BTD, later(embedded_BTD, k), own)
        targets_N = later_targets(targets_BT, context, k).flatten()
        loss, nll_N = model.head(hidden_BTD.flatten(0, 1), targets_N, loss_weight * model.mtp_weight * factor)
        total = loss if total is None else total + loss
        counts = torch.stack([nll_N.sum(dtype=torch.float64), (targets_N != -100).sum().double()])
        reports.append(report._replace(metrics=report.metrics | {module.metric: counts}))
    return total, reports


def _of_all(targets: torch.Tensor, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
    """Targets of a selection as (B, T), -100 elsewhere."""
    if context.select is None:
        return targets
    all_N = targets.new_full((hidden_BTD.shape[0] * hidden_BTD.shape[1],), -100)
    return all_N.index_copy(0, context.select, targets).view(hidden_BTD.shape[:2])
