"""What the processes of an experiment do: one run, one calibration, one measurement of decoding."""

import time
from pathlib import Path

import numpy as np

from fusedlm.compare.decoding import measure_decoding
from fusedlm.compare.process import Report
from fusedlm.config import Recipe
from fusedlm.data import prepare
from fusedlm.evaluate import score_documents
from fusedlm.model import build_model
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.train import TrainingDiverged, train
from fusedlm.train.metrics import read_metrics
from fusedlm.train.progress import Display
from fusedlm.train.run import load

_SECONDS_BETWEEN_REPORTS = 0.1


class _Relay(Display):
    """Passes what a run shows to another process; steps no more often than anyone can read."""

    def __init__(self, report: Report):
        super().__init__(None)
        self._report = report
        self._last = float("-inf")

    def note(self, text: str) -> None:
        self._report("note", text)

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """The text was prepared before: what is left to do takes no time worth showing."""

    def header(self, facts: dict[str, str], implementations: dict) -> None:
        self._report("implementations", {op: choice.name for op, choice in implementations.items()})

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


def train_run(recipe: Recipe, run_dir: Path, report: Report) -> dict:
    """Train, or go on with what an interruption left, and score all the held-out text.

    Returns:
        "outcome": finished, diverged or stopped; "message"; "final": the last validation on all held-out tokens as
        metrics.jsonl has it, where the run finished.
    """
    try:
        result = train(recipe, run_dir, resume=True, display=_Relay(report))
    except TrainingDiverged as error:
        return {"outcome": "diverged", "message": str(error), "final": None}
    if result.stopped_by_signal:
        return {"outcome": "stopped", "message": "", "final": None}
    return {"outcome": "finished", "message": "", "final": _final_score(recipe, run_dir)}


def _final_score(recipe: Recipe, run_dir: Path) -> dict:
    shards = prepare(recipe.data).validation
    records, _ = read_metrics(run_dir / "metrics.jsonl")
    last = [record for record in records if "val_bpb" in record][-1]
    if last["val_tokens"] == shards.n_tokens - shards.n_documents:
        return {key: last[key] for key in ("val_bpb", "val_nll_per_token", "val_tokens", "val_bytes")}
    model, _, _ = load(run_dir, device=recipe.train.device)
    device = resolve_device(recipe.train.device)
    score = score_documents(
        model,
        shards.documents(),
        window=recipe.train.seq_len,
        stride=recipe.train.seq_len,
        device=device,
        dtype=resolve_dtype(recipe.train.dtype, device),
    )
    return {
        "val_bpb": score.bpb,
        "val_nll_per_token": score.nll_per_token,
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
    }


def calibrate(recipe: Recipe, folder: Path, report: Report) -> float | None:
    """Seconds of a step, the lower quartile behind the first quarter, in which things warm up and compile: whatever
    else a machine does only ever slows a step. None: it was stopped.

    The run is as short as `recipe` says and is of no other use.
    """
    result = train(recipe, folder, resume=True, display=_Relay(report))
    if result.stopped_by_signal:
        return None
    records, _ = read_metrics(folder / "metrics.jsonl")
    seconds = [record["step_seconds"] for record in records if "step_seconds" in record]
    return float(np.quantile(seconds[len(seconds) // 4 :], 0.25))


def measure(recipe: Recipe, run_dir: Path | None, vocab_size: int, lengths: list[int], report: Report) -> dict:
    """Decoding with the weights of a run, or untrained ones where no run of the variant got that far.

    Returns:
        length -> (bytes of state, tokens a second), or None where it did not fit.
    """
    device = resolve_device(recipe.train.device)
    dtype = resolve_dtype(recipe.train.dtype, device)
    if run_dir is not None:
        model, _, _ = load(run_dir, device=recipe.train.device)
    else:
        model = build_model(recipe.model, vocab_size=vocab_size, device=device, dtype=dtype)
    return measure_decoding(model, lengths, device, dtype)
