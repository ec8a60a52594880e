"""Optional loggers in addition to metrics.jsonl. One that fails in the middle of a run does not end the run."""

import importlib
import importlib.util
import logging
from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.terminal import one_line

# Module and class in this package, the packages they need, and what installs these.
_LOGGERS = {
    "csv": ("csv_table", "CSVLogger", (), ""),
    "mlflow": ("mlflow", "MLflowLogger", ("mlflow",), "mlflow"),
    "tensorboard": ("tensorboard", "TensorBoardLogger", ("tensorboard",), "tensorboard"),
    "wandb": ("wandb", "WandbLogger", ("wandb",), "wandb"),
}
# What they write in RUN/.
FILES = ("metrics.csv", "mlflow.db", "mlflow-id.txt", "mlflow-artifacts", "tensorboard", "wandb", "wandb-id.txt")
_ADVICE = {"wandb": " To train without a login, set WANDB_MODE=offline or remove wandb from train.loggers."}
_log = logging.getLogger(__name__)


def check_loggers(names: list[str]) -> None:
    """Raises ValueError if the package of a logger is not installed."""
    for name in names:
        _, _, packages, install = _LOGGERS[name]
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"train.loggers={names}: package {package} is not installed; pip install {install}")


class Loggers:
    """The loggers of a run.

    Args:
        start_step: of the checkpoint that the run resumes from; 0: from the beginning. Later points, of steps that will
            be repeated, do not appear twice.

    Raises:
        ValueError: a logger cannot start. Those that had started are closed.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        self._open = {}
        for name in recipe.train.loggers:
            module, cls, _, _ = _LOGGERS[name]
            try:
                opened = importlib.import_module(f"{__name__}.{module}")
                self._open[name] = getattr(opened, cls)(recipe, run_dir, start_step)
            except Exception as error:
                self.close()
                problem = f"train.loggers={recipe.train.loggers}: {name} cannot start: {_reason(error)}"
                raise ValueError(problem + _ADVICE.get(name, "")) from error

    def log(self, record: dict) -> None:
        """Log a record of metrics.jsonl. A logger that fails is closed, with a warning."""
        for name, logger in list(self._open.items()):
            try:
                logger.log(record)
            except Exception as error:
                message = "logger %s failed at step %s (%s); the run continues without it"
                _log.warning(message, name, record["step"], _reason(error))
                self._close(name, quiet=True)

    def close(self) -> None:
        """Close all; a failure is a warning."""
        for name in list(self._open):
            self._close(name, quiet=False)

    def _close(self, name: str, *, quiet: bool) -> None:
        try:
            self._open.pop(name).close()
        except Exception as error:
            if not quiet:
                _log.warning("logger %s could not be closed (%s); its last points may be missing", name, _reason(error))


def _reason(error: Exception) -> str:
    return one_line(str(error)) or type(error).__name__
