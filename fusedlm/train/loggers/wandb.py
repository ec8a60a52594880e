"""Weights & Biases: a run of project `fusedlm`, or that of WANDB_PROJECT."""

import os
import uuid
from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.files import write_atomic
from fusedlm.runs.folder import METRICS
from fusedlm.runs.metrics import read_metrics
from fusedlm.train.loggers.tags import tagged

_STEP, _VALIDATION = "loss", "val_bpb"  # a key of each kind of record
_FINISH_SECONDS = 300  # without a network, the upload at the end would be tried for ever


class WandbLogger:
    """Its id is in RUN/wandb-id.txt, so that resuming continues the same run.

    W&B numbers rows by step and takes each number once. Steps that a resumed run repeats are therefore not sent again.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        import wandb

        id_file = run_dir / "wandb-id.txt"
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else ""
        run_id = known or uuid.uuid4().hex
        known_settings = getattr(wandb.Settings, "model_fields", ())  # earlier releases have no limit
        limit = {"finish_timeout": _FINISH_SECONDS} if "finish_timeout" in known_settings else {}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fusedlm"),
            name=recipe.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(**limit),
        )
        if not known:
            write_atomic(id_file, run_id)
        self._offline, self._free_row = self._run.offline, self._run.starting_step
        # An offline run does not know what was logged before; the metrics do, and are one record ahead at most.
        self._sent = dict.fromkeys((_STEP, _VALIDATION), 0)
        if known:
            for record in read_metrics(run_dir / METRICS)[0]:
                self._sent[_kind(record)] = max(self._sent[_kind(record)], record["step"])

    def log(self, record: dict) -> None:
        step = record["step"]
        if step <= self._sent[_kind(record)] and (self._offline or step < self._free_row):
            return
        # A validation that was interrupted comes after the row of its step: it goes into the next one.
        self._run.log(tagged(record), step=max(step, self._free_row))

    def close(self) -> None:
        self._run.finish()


def _kind(record: dict) -> str:
    return _VALIDATION if _VALIDATION in record else _STEP
