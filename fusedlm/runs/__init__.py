"""The folder of a run, written by training and read by everything else: loading, checkpoints, metrics, hardware."""

from fusedlm.runs.load import choose_checkpoint, load

__all__ = ["choose_checkpoint", "load"]
