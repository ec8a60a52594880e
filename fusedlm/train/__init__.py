"""Training: the loop, metrics, checkpoints and the run folder."""

from fusedlm.train.loop import train
from fusedlm.train.trainer import TrainingDiverged, TrainResult

__all__ = ["TrainResult", "TrainingDiverged", "train"]
