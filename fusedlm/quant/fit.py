"""An artifact of at most so many bytes: steps are chosen by estimated bytes, and the estimate is corrected by the file
that comes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fusedlm.quant.artifact.budget import OverBudget, break_down
from fusedlm.quant.artifact.write import Packed
from fusedlm.quant.calibration import Calibration
from fusedlm.quant.integer import IntegerMatrix
from fusedlm.quant.matrix import Outcome
from fusedlm.quant.plan import Estimate, fit_budget
from fusedlm.quant.sequence import Choice, Progress, quantize_in_order
from fusedlm.quant.targets import named

_MOST_FILES = 4
_UNUSED = 5e-4  # of the limit, with which a file is good enough


@dataclass(frozen=True)
class Fitted:
    """packed: the file. choices, outcomes: of its matrices, by the names of their parameters. sizes: bytes of all files
    that were tried, with what counts too."""

    packed: Packed
    choices: dict[str, Choice]
    outcomes: dict[str, Outcome]
    sizes: list[int]


def fit_artifact(
    model: torch.nn.Module,
    estimates: Mapping[str, Sequence[Estimate]],
    calibration: Calibration,
    build: Callable[[Mapping[str, IntegerMatrix]], Packed],
    limit: int,
    *,
    others: int,
    code: Callable[[Packed], int] = lambda packed: 0,
    progress: Progress | None = None,
) -> Fitted:
    """Quantise a model for an artifact that is as large as a limit allows.

    Afterwards the model has the values of the last file that was tried, which need not be the one that is returned.

    Args:
        estimates: of each matrix, among which the limit chooses.
        build: makes the file of the codes of all matrices.
        limit: bytes.
        others: first guess of the bytes that are not in the estimates.
        code: bytes beside a file that count in the limit too.

    Raises:
        OverBudget: the smallest file is larger.
        ValueError: as `quantize_in_order`.
    """
    targets = {name: target for name, target in named(model).items() if name in estimates}
    weights = {name: target.parameter.detach().clone() for name, target in targets.items()}
    budget, chosen, best, sizes = limit, None, None, []
    while len(sizes) < _MOST_FILES:
        choices = _choices(estimates, budget, others)
        if choices == chosen:
            break
        chosen = choices
        for name, target in targets.items():
            target.write(weights[name])
        outcomes = quantize_in_order(model, choices, calibration, progress=progress)
        packed = build({name: outcome.matrix for name, outcome in outcomes.items()})
        extra = code(packed)
        sizes.append(len(packed.content) + extra)
        left = limit - sizes[-1]
        if left >= 0 and (best is None or len(packed.content) > len(best.packed.content)):
            best = Fitted(packed, choices, outcomes, sizes)
        if 0 <= left <= _UNUSED * limit:
            break
        budget += left - round(_UNUSED * limit / 2)
    if best is None:
        raise OverBudget(break_down(packed.header, packed.header_bytes), limit, extra)
    return best


def _choices(estimates: Mapping[str, Sequence[Estimate]], budget: int, others: int) -> dict[str, Choice]:
    """Those of the budget, or the smallest, so that the error names the bytes of each tensor."""
    try:
        return fit_budget(estimates, budget, others)
    except ValueError:
        return {name: min(own, key=lambda estimate: estimate.n_bytes).choice for name, own in estimates.items()}
