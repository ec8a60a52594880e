"""Differential linear attention: two normalised streams of linear attention, subtracted and normalised."""
