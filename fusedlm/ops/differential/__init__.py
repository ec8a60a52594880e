"""Fused subtract + head RMSNorm of differential attention."""
