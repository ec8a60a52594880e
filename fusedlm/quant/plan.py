"""What each matrix of a model is rounded to: one width for all, or widths and corrections by their estimated errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fusedlm.quant.calibration import Calibration
from fusedlm.quant.low_rank import low_rank_bytes
from fusedlm.quant.matrix import Inputs, quantize_matrix
from fusedlm.quant.sequence import Choice, Progress, measured
from fusedlm.quant.targets import Target, named, stages
from fusedlm.quant.widths import Option, choose_options


@dataclass(frozen=True)
class Estimate:
    """Of one matrix, rounded as a choice says while the others are not.

    error: tr(E H E^T). nll: what it adds to the loss, nats per token, to second order, with the gradients of outputs
    taken as independent and of equal size: E|g|^2 / (2 outputs) tr(E H E^T).
    """

    choice: Choice
    n_bytes: int
    error: float
    nll: float


def choice_bytes(target: Target, choice: Choice) -> int:
    """Bytes of codes, scales and correction."""
    rank = choice.rank if target.stack == 1 else 0
    return choice.format.n_bytes(*target.shape) + low_rank_bytes(*target.shape, rank)


def estimate(
    model: torch.nn.Module,
    calibration: Calibration,
    candidates: Mapping[str, Sequence[Choice]],
    progress: Progress | None = None,
) -> dict[str, list[Estimate]]:
    """Of each matrix and each of its candidates, by the name of the parameter; the model is not changed."""
    targets = named(model)
    gradients = calibration.gradients([targets[name] for name in candidates])
    found: dict[str, list[Estimate]] = {}
    for stage in stages(model):
        own = tuple(target for target in stage.targets if target.name in candidates)
        if not own:
            continue
        inputs = measured(replace(stage, targets=own), calibration, progress)
        for target in own:
            parts, weight_NK = inputs[target.name], target.parameter.detach().flatten(0, -2)
            sensitivity = gradients[target.name] / max(_power(parts), torch.finfo(torch.float32).tiny)
            factor = 0.5 * sensitivity / _outputs(target)
            for choice in candidates[target.name]:
                outcome = quantize_matrix(weight_NK, parts, choice.format, choice.method, choice.rank)
                result = Estimate(choice, choice_bytes(target, choice), outcome.error, factor * outcome.error)
                found.setdefault(target.name, []).append(result)
    return found


def _power(parts: Sequence[Inputs]) -> float:
    """E|x|^2 of a token, over all matrices of a stack. Of look-ups x is one-hot, and it is 1."""
    if parts[0].hessian_KK is None:
        return 1.0
    used = [1.0 if part.row_weight_N is None else float(part.row_weight_N) for part in parts]
    return sum(share * float(part.hessian_KK.trace()) for share, part in zip(used, parts, strict=True))


def _outputs(target: Target) -> int:
    """Elements of the output of one token."""
    n_rows, width = target.shape
    return width if target.kind == "embedding" and not target.tied else n_rows // target.stack


def fit_budget(estimates: Mapping[str, Sequence[Estimate]], budget: int, others: int) -> dict[str, Choice]:
    """The choice of each matrix for which the estimated loss is least and all fit a number of bytes.

    Args:
        others: bytes of what is not quantised.

    Raises:
        ValueError: they do not fit, with the bytes of the parts.
    """
    options = {name: [Option(e.choice, e.n_bytes, e.nll) for e in own] for name, own in estimates.items()}
    if budget < others:
        raise ValueError(f"budget={budget}: the tensors that are not quantised take {others:,} bytes alone")
    try:
        chosen = choose_options(options, budget - others)
    except ValueError as error:
        raise ValueError(f"budget={budget}: {error} that {others:,} bytes of other tensors leave") from None
    return {name: option.key for name, option in chosen.items()}


def correct_best(estimates: Mapping[str, Sequence[Estimate]], n: int) -> dict[str, Choice]:
    """Of two estimates per matrix, without and with a correction: with it for the n matrices where it lowers the
    estimated loss most per byte, and without it elsewhere."""
    gains = {
        name: (plain.nll - corrected.nll) / (corrected.n_bytes - plain.n_bytes)
        for name, (plain, corrected) in estimates.items()
        if corrected.n_bytes > plain.n_bytes and corrected.nll < plain.nll
    }
    best = set(sorted(gains, key=lambda name: (-gains[name], name))[:n])
    return {name: own[name in best].choice for name, own in estimates.items()}
