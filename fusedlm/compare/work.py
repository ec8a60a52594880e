"""Work of the processes of an experiment: a run, a calibration, a measurement of decoding."""

import time
from pathlib import Path

import numpy as np

from fusedlm.compare.decoding import measure_decoding
from fusedlm.compare.process import Report
from fusedlm.config import Recipe
from fusedlm.evaluate import score_documents
from fusedlm.model import build_model
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.runs.backends import use_backends
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


def train_run(recipe: Recipe, run_dir: Path, text: str, report: Report) -> dict:
    """Train, or resume an interrupted run, and score all validation text.

    Args:
        text: fingerprint of the prepared text, the same for all runs of an experiment even if the source changes.

    Returns:
        "outcome": finished, diverged or stopped; "message"; "final": the score of a finished run on all validation
        text, with keys as in metrics.jsonl.
    """
    try:
        result = train(recipe, run_dir, resume=True, display=_Relay(report), text=text, strict_backends=False)
    except TrainingDiverged as error:
        return {"outcome": "diverged", "message": str(error), "final": None}
    if result.stopped_by_signal:
        return {"outcome": "stopped", "message": "", "final": None}
    return {"outcome": "finished", "message": "", "final": _final_score(recipe, run_dir, text)}


def _final_score(recipe: Recipe, run_dir: Path, text: str) -> dict:
    shards = open_text(recipe, text, run_dir, remedy="restore the text").validation
    records, _ = read_metrics(run_dir / "metrics.jsonl")
    last = [record for record in records if "val_bpb" in record][-1]
    if last["val_tokens"] == shards.n_tokens - shards.n_documents:
        return {key: last[key] for key in ("val_bpb", "val_nll_per_token", "val_tokens", "val_bytes")}
    device = resolve_device(recipe.runtime.device)
    model, _, _ = load(run_dir, device=device)
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

    The run is as short as `recipe` says and is used for nothing else.
    """
    result = train(recipe, folder, resume=True, display=_Relay(report), strict_backends=False)
    if result.stopped_by_signal:
        return None
    records, _ = read_metrics(folder / "metrics.jsonl")
    seconds = [record["step_seconds"] for record in records if "step_seconds" in record]
    return float(np.quantile(seconds[len(seconds) // 4 :], 0.25))


def measure(recipe: Recipe, run_dir: Path | None, vocab_size: int, lengths: list[int], report: Report) -> dict:
    """Measure decoding with the weights of a run; None: untrained weights, since no run of the variant has finished.

    Returns:
        length -> (bytes of state, tokens per second), or None if out of memory.
    """
    device = resolve_device(recipe.runtime.device)
    dtype = resolve_dtype(recipe.runtime.dtype, device)
    if run_dir is not None:
        model, _, _ = load(run_dir, device=device)
    else:
        model = build_model(recipe.model, vocab_size=vocab_size, device=device)
        use_backends(model, recipe.runtime, device, dtype, strict=False)
    return measure_decoding(model, lengths, device, dtype)
