"""Optimizers, learning-rate schedules and averages of weights."""

from fusedlm.optim.ema import ExponentialMovingAverage
from fusedlm.optim.optimizer import build_optimizer, parameter_groups, update_if
from fusedlm.optim.schedule import schedule_scale
from fusedlm.optim.state import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "ExponentialMovingAverage",
    "build_optimizer",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "parameter_groups",
    "schedule_scale",
    "update_if",
]
