"""The projection of one token in plain PyTorch."""

import torch
import torch.nn.functional as F


def prepared(x, gain, eps: float, activation: str | None, slope: float) -> torch.Tensor:
    """What is multiplied by the weight, in float32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if gain is not None:
        x = F.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), eps)
    if activation == "relu2":
        x = F.leaky_relu(x, slope).square()
    elif activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    return x


def token_linear(x, weight, gain, eps: float, activation: str | None, slope: float, residual, dtype) -> torch.Tensor:
    y = F.linear(prepared(x, gain, eps, activation, slope).to(dtype), weight.to(dtype))
    return y if residual is None else (residual + y).to(dtype)
