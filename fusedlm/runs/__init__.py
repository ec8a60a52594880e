"""The folder of a run, written by training and read by everything else: loading, checkpoints, metrics, hardware."""

from fusedlm.runs.load import load, load_checkpoint

__all__ = ["load", "load_checkpoint"]
