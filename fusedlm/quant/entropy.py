"""What integer codes take when they are coded by their frequencies."""

import torch


def entropy_bytes(codes: torch.Tensor) -> float:
    """Bytes of codes (int8, any shape) at their order-0 entropy, the size that an entropy coder without contexts
    approaches."""
    counts = torch.bincount(codes.flatten().long() + 128, minlength=256).double()
    counts = counts[counts > 0]
    return float((counts * (counts.sum() / counts).log2()).sum()) / 8
