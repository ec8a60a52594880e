"""Public function that draws the next token."""

import math

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.draw import reference

DRAW_TOKEN = Op(
    "draw_token",
    [
        Backend("triton", "fusedlm.ops.draw.triton:draw_token", needs_triton),
        Backend("reference", reference.draw_token, fused=False),
    ],
)


def draw_token(logits_BV, uniform_B=None, *, temperature: float = 1.0, backend: str = "auto") -> torch.Tensor:
    """One token for each row by inverting the cumulative sum of exp(logits / temperature), in float64: the first id
    whose sum exceeds the uniform fraction of the total. Nothing waits for the device.

    Args:
        logits_BV: (B, V) of any float dtype, V at least 1; -inf for ids that are never drawn.
        uniform_B: (B,) float64 random numbers in [0, 1); not needed with temperature 0.
        temperature: at least 0; 0: the most likely token, of equal ones the lowest.
        backend: auto, triton or reference. They add in different orders: for one draw in about 1e11 the fraction is so
            near a sum that they may give neighbouring ids.

    Returns:
        (B,) int64; -1 where a logit is NaN or +inf, or all are -inf.

    Raises:
        ValueError: the shapes do not match, the temperature is out of range, random numbers are missing, or the backend
            cannot run this call.
    """
    if logits_BV.ndim != 2 or not logits_BV.shape[1]:
        raise ValueError(f"logits {tuple(logits_BV.shape)} must be (B, V), V at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be a finite number of at least 0")
    if temperature > 0:
        if uniform_B is None:
            raise ValueError(f"temperature={temperature} needs random numbers; give uniform_B, or temperature=0")
        if uniform_B.shape != logits_BV.shape[:1] or uniform_B.dtype != torch.float64:
            raise ValueError(
                f"uniform {tuple(uniform_B.shape)} of {uniform_B.dtype} must be ({len(logits_BV)},) of torch.float64"
            )
    run = resolve("draw_token", backend, logits_BV)
    return run(logits_BV, uniform_B if temperature > 0 else None, float(temperature))
