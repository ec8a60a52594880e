"""Gated linear recurrence per channel, as a parallel scan."""
