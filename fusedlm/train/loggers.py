"""Optional loggers in addition to metrics.jsonl."""

import importlib.util
import uuid
from pathlib import Path
from typing import Protocol

from fusedlm.config import Recipe
from fusedlm.files import write_atomic

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Logger(Protocol):
    def log(self, record: dict) -> None:
        """Log a record of metrics.jsonl; values that are not numbers are skipped."""

    def close(self) -> None: ...


class TensorBoardLogger:
    """Event files in RUN/tensorboard."""

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Hides events after the checkpoint that the run resumes from; they will be written again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(self, record: dict) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A run of project `fusedlm`, whose id is in RUN/wandb-id.txt, so that resuming continues the same run."""

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        import wandb

        id_file = run_dir / "wandb-id.txt"
        if not id_file.exists():
            write_atomic(id_file, uuid.uuid4().hex)
        self._run = wandb.init(
            project="fusedlm",
            name=recipe.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=recipe.model_dump(mode="json"),
        )

    def log(self, record: dict) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


_CLASSES = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}


def check_loggers(names: list[str]) -> None:
    """Raises ValueError if the package of a logger is not installed."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            package = _PACKAGES[name]
            raise ValueError(f"train.loggers={names}: package {package} is not installed; pip install {package}")


def open_loggers(recipe: Recipe, run_dir: Path, start_step: int) -> list[Logger]:
    return [_CLASSES[name](recipe, run_dir, start_step) for name in recipe.train.loggers]


def _numbers(record: dict) -> dict[str, float]:
    return {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
