"""Optimizers, learning-rate schedules and weight averaging."""

from fusedlm.optim.averages import Averages, ExponentialMovingAverage, WeightAverage
from fusedlm.optim.cautious_adamw import CautiousAdamW
from fusedlm.optim.muon import MuonAdamW
from fusedlm.optim.optimizer import (
    build_optimizer,
    describe_split,
    optimizer_bytes,
    optimizer_split,
    parameter_groups,
    set_learning_rates,
    step_if,
)
from fusedlm.optim.schedule import schedule_scale
from fusedlm.optim.state import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "Averages",
    "CautiousAdamW",
    "ExponentialMovingAverage",
    "MuonAdamW",
    "WeightAverage",
    "build_optimizer",
    "describe_split",
    "load_optimizer_tensors",
    "optimizer_bytes",
    "optimizer_split",
    "optimizer_tensors",
    "parameter_groups",
    "schedule_scale",
    "set_learning_rates",
    "step_if",
]
