"""Quantise the weights of a model in the order in which a token meets them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fusedlm.quant.calibration import Calibration
from fusedlm.quant.formats import Format
from fusedlm.quant.matrix import Inputs, Method, Outcome, quantize_matrix
from fusedlm.quant.targets import Stage, stages
from fusedlm.quant.unfinished import UnfinishedFolder


@dataclass(frozen=True)
class Choice:
    """What one matrix is rounded to, how, and the rank of its correction (0: none)."""

    format: Format
    method: Method
    rank: int = 0


Progress = Callable[[str, int, int], None]  # (stage, done, total)


def quantize_in_order(
    model: torch.nn.Module,
    choices: Mapping[str, Choice],
    calibration: Calibration | None = None,
    *,
    unfinished: UnfinishedFolder | None = None,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Quantise parameters, whose values in the model become those of their codes.

    The inputs of a stage are those of the model whose earlier stages are quantised already: their weights compensate
    errors of the ones before too. Matrices of a stage are all calibrated with the others of it as they were.

    Args:
        choices: by the name of the parameter; others are not changed.
        calibration: None: nothing is known of the inputs.
        unfinished: where finished matrices are kept; those that it has are not recomputed.

    Returns:
        The matrices by name, in order.

    Raises:
        ValueError: as `quantize_matrix`, with the name of the parameter.
    """
    outcomes: dict[str, Outcome] = {}
    for stage in stages(model):
        targets = tuple(target for target in stage.targets if target.name in choices)
        found, missing = {}, []
        for target in targets:
            kept = unfinished and unfinished.load(target.name, target.parameter.device)
            if kept is None:
                missing.append(target)
            else:
                found[target.name] = kept
        inputs = _inputs(stage, missing, calibration, progress)
        for target in missing:
            choice = choices[target.name]
            weight_NK = target.parameter.detach().flatten(0, -2)
            try:
                outcome = quantize_matrix(weight_NK, inputs[target.name], choice.format, choice.method, choice.rank)
            except ValueError as error:
                raise ValueError(f"{target.name.removesuffix('.weight')}: {error}") from None
            found[target.name] = outcome
            if unfinished is not None:
                unfinished.save(target.name, outcome)
        # Only now: a run that resumes within a stage measures the same inputs.
        for target in targets:
            target.write(found[target.name].values())
            outcomes[target.name] = found[target.name]
    return outcomes


def _inputs(stage: Stage, targets, calibration: Calibration | None, progress) -> dict[str, list[Inputs]]:
    if calibration is None or not targets:
        return {target.name: [Inputs()] * target.stack for target in targets}
    return measured(Stage(stage.name, tuple(targets), stage.last), calibration, progress)


def measured(stage: Stage, calibration: Calibration, progress: Progress | None) -> dict[str, list[Inputs]]:
    """`Calibration.inputs` with its progress."""
    n_tokens, note = calibration.n_tokens, f"calibrating {stage.name}"
    return calibration.inputs(stage, progress and (lambda done: progress(note, done, n_tokens)))
