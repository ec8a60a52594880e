"""Training: one optimizer step, the loop of a run, its display and its loggers."""

from fusedlm.train.loop import train
from fusedlm.train.trainer import TrainingDiverged, TrainResult

__all__ = ["TrainResult", "TrainingDiverged", "train"]
