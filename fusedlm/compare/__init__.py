"""Variants of a recipe over seeds: what is held equal, the grid of runs, what is measured, and one report."""

from fusedlm.compare.experiment import plan_experiment, run_experiment

__all__ = ["plan_experiment", "run_experiment"]
