"""TensorBoard: event files in RUN/tensorboard."""

from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.train.loggers.tags import tagged


class TensorBoardLogger:
    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Hides events after the checkpoint that the run resumes from; they will be written again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, record: dict) -> None:
        for name, value in tagged(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()
