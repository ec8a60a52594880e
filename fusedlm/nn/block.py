"""The pre-norm residual block."""

import torch

from fusedlm.config.model import BlockConfig, ModelConfig
from fusedlm.nn.context import Context
from fusedlm.nn.ffn import FFNS
from fusedlm.nn.mixers import MIXERS
from fusedlm.nn.norm import RMSNorm
from fusedlm.ops.common import Setting


class Block(torch.nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: BlockConfig, model: ModelConfig, setting: Setting, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(model.dim, model.norm_eps)
        self.mixer = MIXERS[config.mixer.type](config.mixer, model, setting, layer)
        self.ffn_norm = RMSNorm(model.dim, model.norm_eps)
        self.ffn = FFNS[config.ffn.type](config.ffn, model)
        self.dropout = torch.nn.Dropout(model.dropout)

    def forward(self, x_BTD: torch.Tensor, context: Context, state=None) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.mixer(self.mixer_norm(x_BTD), context, state))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))

    def flops(self, n_tokens: int) -> int:
        return self.mixer.flops(n_tokens) + self.ffn.flops(n_tokens)
