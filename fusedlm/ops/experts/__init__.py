"""Feed-forward of routed experts without dropped tokens: rows sorted by expert, one grouped product per layer."""
