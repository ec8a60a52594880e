"""Steps and seconds to the baseline's final loss."""

import math
from dataclasses import dataclass

import numpy as np

from fusedlm.compare.matching import Variant
from fusedlm.compare.statistics import Summary, summarise
from fusedlm.report.history import History, median

STEPS, SECONDS = "steps_to_baseline_loss", "seconds_to_baseline_loss"  # columns of runs
_COMPILATION = 5  # times the median: a step that takes longer compiles


@dataclass(frozen=True)
class TimeToLoss:
    """Of the runs of a variant that have ended; of the baseline itself, its totals, which are ratios of 1.

    Means and ratios are None unless every run reached the loss: a mean over the rest would be too low.
    """

    n_runs: int
    n_reached: int
    steps: float | None  # mean over runs
    seconds: float | None  # None too if steps of a run are not timed
    steps_ratio: Summary  # over seeds, to the mean of the baseline's totals
    seconds_ratio: Summary


def seconds_of_validations(history: History) -> np.ndarray:
    """Seconds of training before each validation, (n,): those of steps, without validations and compilation. A step
    that takes more than 5 times the median counts as the median. NaN if no step is timed."""
    spent = history.steps["step_seconds"]
    typical = median(spent)
    if typical is None:
        return np.full(len(history.validation["step"]), np.nan)
    spent = np.where(spent <= _COMPILATION * typical, spent, typical)  # also where it is NaN
    elapsed = np.concatenate([[0.0], np.cumsum(spent)])
    return elapsed[np.searchsorted(history.steps["step"], history.validation["step"], side="right")]


def validation_curve(history: History, weights: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, seconds and bits per byte, (n,) each, of the validations during training of the weights that are scored.

    Args:
        weights: raw, ema or swa.
    """
    loss = history.validation["val_bpb" if weights == "raw" else f"val_bpb_{weights}"]
    kept = np.isfinite(loss)
    return history.validation["step"][kept], seconds_of_validations(history)[kept], loss[kept]


def crossing(loss: np.ndarray, target: float) -> float | None:
    """Where a curve first is at or below a target, as an index: between two values by linear interpolation, 0 if the
    first value is below. None: nowhere."""
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return None
    after = int(below[0])
    if after == 0:
        return 0.0
    return after - 1 + float((loss[after - 1] - target) / (loss[after - 1] - loss[after]))


def is_comparable(variants: dict[str, Variant]) -> bool:
    """Whether validations during training are of the same text for all variants, and more than one of each run."""
    trains = [variant.recipe.train for variant in variants.values()]
    tokenizers = {variant.recipe.data.tokenizer.model_dump_json() for variant in variants.values()}
    lengths = {train.eval_tokens for train in trains}
    same_text = lengths == {None} or (len(lengths) == 1 and len(tokenizers) == 1)
    return same_text and all(0 < train.eval_every < train.steps for train in trains)


def add_time_to_loss(
    rows: list[dict], histories: dict[tuple[str, int], History], baseline: str, weights: str
) -> float | None:
    """Add steps and seconds to the baseline's final loss to the rows of finished runs that reach it.

    Of the baseline they are its own totals.

    Returns:
        That loss in bits per byte: the mean over the seeds of the baseline of the last validation in training. None:
        no run of the baseline has finished with one.
    """
    finished = [row for row in rows if row["outcome"] == "finished"]
    curves = [validation_curve(histories[row["variant"], row["seed"]], weights) for row in finished]
    of_baseline = [curve for row, curve in zip(finished, curves, strict=True) if row["variant"] == baseline]
    lasts = [loss[-1] for *_, loss in of_baseline if len(loss)]
    if not lasts:
        return None
    target = math.fsum(lasts) / len(lasts)
    for row, (steps, seconds, loss) in zip(finished, curves, strict=True):
        place = len(loss) - 1 if row["variant"] == baseline else crossing(loss, target)
        if place is not None and len(loss):
            at = np.arange(len(loss))
            spent = float(np.interp(place, at, seconds))
            row |= {STEPS: float(np.interp(place, at, steps)), SECONDS: None if math.isnan(spent) else spent}
    return target


def summarise_time(rows: list[dict], of_baseline: list[dict]) -> TimeToLoss | None:
    """Of the rows of a variant, and of the baseline. Runs that diverged have not reached the loss; failed and
    unfinished ones do not count. None: no run of the baseline has a loss."""
    reference = [row for row in of_baseline if row["outcome"] == "finished" and row[STEPS] is not None]
    if not reference:
        return None
    ended = [row for row in rows if row["outcome"] in ("finished", "diverged")]
    reached = [row for row in ended if row["outcome"] == "finished" and row[STEPS] is not None]
    if not ended or len(reached) < len(ended):
        return TimeToLoss(len(ended), len(reached), None, None, summarise([]), summarise([]))
    means, ratios = [], []
    for column in (STEPS, SECONDS):
        values = [row[column] for row in reached]
        if None in values or any(row[column] is None for row in reference):
            means.append(None)
            ratios.append(summarise([]))
            continue
        total = math.fsum(row[column] for row in reference) / len(reference)
        means.append(math.fsum(values) / len(values))
        ratios.append(summarise([value / total for value in values] if total > 0 else []))
    return TimeToLoss(len(ended), len(reached), *means, *ratios)


def time_sentence(variant: str, baseline: str, found: TimeToLoss) -> str:
    """What a variant needs for the baseline's final loss."""
    if found.n_reached < found.n_runs or not found.n_runs:
        runs = f"{found.n_reached} of {found.n_runs} runs"
        return f"{variant} against {baseline}: final loss of {baseline} not reached by every run ({runs})"
    parts = [_ratio(found.steps_ratio, "steps")]
    if found.seconds_ratio.n:
        parts.append(_ratio(found.seconds_ratio, "seconds"))
    return f"{variant} against {baseline}: final loss of {baseline} after {' and '.join(parts)}"


def _ratio(found: Summary, noun: str) -> str:
    interval = "" if found.low is None else f" (95% interval {found.low:.3f} to {found.high:.3f})"
    return f"{found.mean:.3f} of its {noun}{interval}"
