"""Quantisation of trained models: the weights that layers get, the run folder or the artifact that holds them, and
loading of both."""

from fusedlm.quant.load import load, load_checkpoint

__all__ = ["load", "load_checkpoint"]
