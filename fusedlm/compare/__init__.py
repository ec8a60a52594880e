"""Variants of a recipe over seeds: matching, the grid of runs, measurements, and a report."""

from fusedlm.compare.experiment import plan_experiment, run_experiment

__all__ = ["plan_experiment", "run_experiment"]
