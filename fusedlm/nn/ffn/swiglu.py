"""SwiGLU feed-forward (arXiv 2002.05202)."""

import torch
import torch.nn.functional as F

from fusedlm.config.ffn import SwiGLUConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.linear import Linear, product_dtype
from fusedlm.ops.common import Setting
from fusedlm.ops.swiglu_mlp.op import SWIGLU_MLP, swiglu_mlp


class SwiGLU(torch.nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one packed projection."""

    def __init__(self, config: SwiGLUConfig, model: ModelConfig, setting: Setting):
        super().__init__()
        hidden = config.hidden or -(-8 * model.dim // (3 * 64)) * 64
        self.gate_up = Linear(model.dim, 2 * hidden)
        self.down = Linear(hidden, model.dim, zero=True)
        self.whole = SWIGLU_MLP.choose(model.impl.swiglu_mlp, setting)
        self.choices = [self.whole]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.whole.name == "reference":
            gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        x_ND = x_BTD.to(product_dtype(x_BTD)).flatten(0, -2)
        weights = self.gate_up.weight, self.down.weight
        return swiglu_mlp(x_ND, *weights, implementation=self.whole.function).view_as(x_BTD)

    def flops(self, n_tokens: int) -> int:
        return self.gate_up.flops(n_tokens) + self.down.flops(n_tokens)
