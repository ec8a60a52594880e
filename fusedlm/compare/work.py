"""Work of the processes of an experiment: a run, a calibration, a measurement of decoding."""

import time
from pathlib import Path

import numpy as np
import torch

from fusedlm.compare.decoding import measure_decoding
from fusedlm.compare.process import Report
from fusedlm.config import Recipe
from fusedlm.evaluate import NotFinite, score_documents
from fusedlm.model import build_model
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.runs.backends import use_backends
from fusedlm.runs.folder import METRICS
from fusedlm.runs.load import load
from fusedlm.runs.metrics import read_metrics
from fusedlm.runs.text import open_text
from fusedlm.train import TrainingDiverged, train
from fusedlm.train.display import Display

_SECONDS_BETWEEN_REPORTS = 0.1


class _Relay(Display):
    """Sends the progress of a run to another process; steps at a limited rate."""

    def __init__(self, report: Report):
        super().__init__(None)
        self._report = report
        self._last = float("-inf")

    def note(self, text: str) -> None:
        self._report("note", text)

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """Not sent: the text is already prepared."""

    def header(self, facts: dict[str, str], backends: dict) -> None:
        self._report("backends", {op: selection.backend for op, selection in backends.items()})

    def begin(self, step: int, steps: int) -> None:
        self._report("begin", step)

    def step(self, record: dict) -> None:
        if record.get("skipped"):
            self.note(f"step {record['step']}: loss or gradient norm is not finite; step skipped")
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_REPORTS:
            self._last = now
            self._report("step", record)

    def validation(self, record: dict) -> None:
        self._report("validation", record)


def train_run(recipe: Recipe, run_dir: Path, text: str, weights: str, report: Report) -> dict:
    """Train, or resume an interrupted run, and score all validation text.

    Args:
        text: fingerprint of the prepared text, the same for all runs of an experiment even if the source changes.
        weights: those to score, as `fusedlm.load` names them.

    Returns:
        "outcome": finished, diverged (a loss, or the likelihood of validation text, is not finite), failed (this run
        cannot be made: the recipe does not fit, or memory is too small), stopped, or system (a fault that other runs
        would meet too, such as a full disk); "message"; "step": the last one, of a diverged run; "final": the score of
        a finished run on all validation text, with keys as in metrics.jsonl.
    """
    try:
        result = train(recipe, run_dir, resume=True, display=_Relay(report), text=text, strict_backends=False)
        if result.stopped_by_signal:
            return _ended("stopped")
        return _ended("finished", final=_final_score(recipe, run_dir, text, weights))
    except (TrainingDiverged, NotFinite) as error:
        return _ended("diverged", str(error), step=_last_step(run_dir))
    except OSError as error:
        return _ended("system", str(error))
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        return _ended("failed", str(error) or "out of memory")


def _ended(outcome: str, message: str = "", *, final: dict | None = None, **more) -> dict:
    return {"outcome": outcome, "message": message.strip().split("\n")[0], "final": final} | more


def _last_step(run_dir: Path) -> int:
    """Of the recorded training steps: a validation that is not finite leaves no record."""
    records, _ = read_metrics(run_dir / METRICS)
    return max((record["step"] for record in records if "loss" in record), default=0)


def _final_score(recipe: Recipe, run_dir: Path, text: str, weights: str) -> dict:
    shards = open_text(recipe, text, run_dir, remedy="restore the text").validation
    records, _ = read_metrics(run_dir / METRICS)
    last = next((record for record in reversed(records) if "val_bpb" in record), {})
    if weights == "raw" and last.get("val_tokens") == shards.n_tokens - shards.n_documents:
        return {key: last[key] for key in ("val_bpb", "val_nll_per_token", "val_tokens", "val_bytes")}
    device = resolve_device(recipe.runtime.device)
    model, _, _ = load(run_dir, weights=weights, device=device)
    score = score_documents(
        model,
        shards.documents(),
        window=recipe.train.seq_len,
        stride=recipe.train.seq_len,
        longest=shards.longest,
        device=device,
        dtype=resolve_dtype(recipe.runtime.dtype, device),
    )
    return {
        "val_bpb": score.bpb,
        "val_nll_per_token": score.nll_per_token,
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
    }


def calibrate(recipe: Recipe, folder: Path, report: Report) -> float | None:
    """Seconds per step: the lower quartile after the first quarter of the steps, which compile and warm up. Other load
    on the machine only makes steps slower. None: stopped.

    The run is as short as `recipe` says and is used for nothing else. Whether its losses are finite does not matter.
    """
    try:
        if train(recipe, folder, resume=True, display=_Relay(report), strict_backends=False).stopped_by_signal:
            return None
    except NotFinite:
        report("note", "the loss is not finite while steps are timed")
    records, _ = read_metrics(folder / METRICS)
    seconds = [record["step_seconds"] for record in records if "step_seconds" in record]
    return float(np.quantile(seconds[len(seconds) // 4 :], 0.25))


def measure(recipe: Recipe, run_dir: Path | None, vocab_size: int, lengths: list[int], report: Report) -> None:
    """Measure decoding with the weights of a run; None: untrained weights, since no run of the variant has finished.

    Reports ("decoded", (length, (bytes of state, tokens per second) or None if out of memory)) after each length, so
    that a length at which the process is killed costs no other.
    """
    device = resolve_device(recipe.runtime.device)
    dtype = resolve_dtype(recipe.runtime.dtype, device)
    if run_dir is not None:
        model, _, _ = load(run_dir, device=device)
    else:
        model = build_model(recipe.model, vocab_size=vocab_size, device=device)
        use_backends(model, recipe.runtime, device, dtype, strict=False)
    for length in lengths:
        report("decoded", (length, measure_decoding(model, [length], device, dtype)[length]))
