"""Linear layers whose three products, output and both gradients, are computed in 8 bits."""
