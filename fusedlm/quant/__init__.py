"""Quantisation of trained models: the weights that layers get, and the run folder that holds them."""
