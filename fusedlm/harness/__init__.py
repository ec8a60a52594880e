"""Benchmarks of the lm-evaluation-harness for runs."""

from fusedlm.harness.run import evaluate_tasks

__all__ = ["evaluate_tasks"]
