"""Activations inside kernels."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of float32 in half of the instructions of tl.sigmoid, whose division scales for quotients that
    float32 cannot represent."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root
