"""MX formats (OCP Microscaling Formats v1.0): conversion of float tensors and back."""
