"""Projections of 16-bit activations by float32 weights in float32."""
