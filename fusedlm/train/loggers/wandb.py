"""Weights & Biases: a run of project `fusedlm`, or that of WANDB_PROJECT."""

import os
import uuid
from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.files import write_atomic
from fusedlm.runs.folder import METRICS
from fusedlm.runs.metrics import read_metrics
from fusedlm.train.loggers.tags import tagged

_ID = "wandb-id.txt"
_STEP, _VALIDATION = "loss", "val_bpb"  # a key of each kind of record
_FINISH_SECONDS = 300  # without a network, the upload at the end would be tried for ever


class WandbLogger:
    """Its id is in RUN/wandb-id.txt, so that resuming continues the same run.

    W&B numbers rows by step and takes each number once. Steps that a resumed run repeats are therefore not sent again.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        id_file = run_dir / _ID
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else ""
        run_id = known or uuid.uuid4().hex
        self._run = _started(run_dir, run_id, name=recipe.name, config=recipe.model_dump(mode="json"))
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

    @staticmethod
    def add_export(run_dir: Path, name: str, figures: dict[str, float | int | str], card: str | None) -> None:
        """See `track_export`. Figures go to the summary under export/NAME/, and with the card into an artifact."""
        import wandb

        run = _started(run_dir, (run_dir / _ID).read_text(encoding="utf-8").strip())
        try:
            run.summary.update({f"export/{name}/{key}": value for key, value in figures.items()})
            artifact = wandb.Artifact(f"export-{name}", type="exported-model", metadata=figures)
            if card is not None:
                with artifact.new_file("README.md", encoding="utf-8") as file:
                    file.write(card)
            run.log_artifact(artifact)
        finally:
            run.finish()


def _started(run_dir: Path, run_id: str, **options):
    """A run of W&B, new or resumed."""
    import wandb

    known_settings = getattr(wandb.Settings, "model_fields", ())  # earlier releases have no limit
    limit = {"finish_timeout": _FINISH_SECONDS} if "finish_timeout" in known_settings else {}
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fusedlm"),
        id=run_id,
        resume="allow",
        dir=str(run_dir),
        settings=wandb.Settings(**limit),
        **options,
    )


def _kind(record: dict) -> str:
    return _VALIDATION if _VALIDATION in record else _STEP
