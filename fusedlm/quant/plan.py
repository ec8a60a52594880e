"""What each matrix of a model is rounded to: one width for all, or widths and corrections by their estimated errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fusedlm.quant.calibration import Calibration
from fusedlm.quant.entropy import entropy_bytes
from fusedlm.quant.low_rank import low_rank_bytes
from fusedlm.quant.matrix import Inputs, Outcome, quantize_matrix
from fusedlm.quant.sequence import Choice, Progress, measured
from fusedlm.quant.targets import Target, named, stages
from fusedlm.quant.widths import Option, choose_options

_MOST_ROWS = 256  # of a matrix, from which the size of its coded rows is estimated
_BETWEEN = 4  # steps of the scale per interval of two that are estimated


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
    *,
    coded: bool = False,
) -> dict[str, list[Estimate]]:
    """Of each matrix and each of its candidates, by the name of the parameter; the model is not changed.

    Args:
        coded: bytes are those of the codes at their entropy, and of the scales; both they and the errors are estimated
            from up to 256 rows, evenly spread.
    """
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
            rows_NK, own_parts, each = _some_rows(weight_NK, parts) if coded else (weight_NK, parts, 1.0)
            sensitivity = gradients[target.name] / max(_power(parts), torch.finfo(torch.float32).tiny)
            factor = 0.5 * sensitivity / _outputs(target)
            for choice in candidates[target.name]:
                outcome = quantize_matrix(rows_NK, own_parts, choice.format, choice.method, choice.rank)
                n_bytes = round(each * coded_bytes(outcome)) if coded else choice_bytes(target, choice)
                error = each * outcome.error
                found.setdefault(target.name, []).append(Estimate(choice, n_bytes, error, factor * error))
    return found


def _some_rows(weight_NK: torch.Tensor, parts: Sequence[Inputs]) -> tuple[torch.Tensor, Sequence[Inputs], float]:
    """(rows, their inputs, how many rows each stands for). Rows of a matrix with one Hessian do not depend on each
    other; where they differ in weight, or belong to several experts, all are taken."""
    n_rows = len(weight_NK)
    if len(parts) > 1 or parts[0].row_weight_N is not None or n_rows <= _MOST_ROWS:
        return weight_NK, parts, 1.0
    chosen = torch.arange(_MOST_ROWS, device=weight_NK.device) * n_rows // _MOST_ROWS
    return weight_NK[chosen], parts, n_rows / _MOST_ROWS


def coded_bytes(outcome: Outcome) -> float:
    """Bytes of codes at their entropy, and of scales."""
    return entropy_bytes(outcome.matrix.codes) + outcome.matrix.scales.nbytes


def between(estimates: Sequence[Estimate]) -> list[Estimate]:
    """The estimates of a matrix by growing clips, and of clips between them: errors of rounding to fine steps grow as
    the square of the step, and bytes fall by its logarithm, so both are interpolated in the logarithm of the clip."""
    result = list(estimates[:1])
    for low, high in zip(estimates, estimates[1:], strict=False):
        for i in range(1, _BETWEEN + 1):
            t = i / _BETWEEN
            method = replace(low.choice.method, clip=_geometric(low.choice.method.clip, high.choice.method.clip, t))
            result.append(
                Estimate(
                    replace(low.choice, method=method),
                    round((1 - t) * low.n_bytes + t * high.n_bytes),
                    _geometric(low.error, high.error, t),
                    _geometric(low.nll, high.nll, t),
                )
            )
    return result


def _geometric(a: float, b: float, t: float) -> float:
    """a^(1 - t) b^t; of a zero, on a line."""
    return math.exp((1 - t) * math.log(a) + t * math.log(b)) if a > 0 and b > 0 else (1 - t) * a + t * b


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
