"""Divergence of a student's distribution from a teacher's, from the inputs and weights of their heads."""
