"""Optimizers, learning-rate schedules and weight averaging."""

from fusedlm.optim.averages import Averages, ExponentialMovingAverage, WeightAverage
from fusedlm.optim.optimizer import build_optimizer, optimizer_bytes, parameter_groups, set_learning_rates, step_if
from fusedlm.optim.schedule import schedule_scale
from fusedlm.optim.state import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "Averages",
    "ExponentialMovingAverage",
    "WeightAverage",
    "build_optimizer",
    "load_optimizer_tensors",
    "optimizer_bytes",
    "optimizer_tensors",
    "parameter_groups",
    "schedule_scale",
    "set_learning_rates",
    "step_if",
]
