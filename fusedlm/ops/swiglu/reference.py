"""SwiGLU feed-forward in plain PyTorch."""

import torch
import torch.nn.functional as F


def swiglu_mlp(x, w_gate_up, w_down) -> torch.Tensor:
    gate_up = F.linear(x, w_gate_up.to(x.dtype))
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return F.linear((F.silu(gate) * up).to(gate_up.dtype), w_down.to(x.dtype))
