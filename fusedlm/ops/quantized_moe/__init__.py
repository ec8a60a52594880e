"""Feed-forward of routed experts whose weights are stored in few bits; activations keep their dtype."""
