"""Gated delta net (arXiv 2412.06464), the linear-time mixer of Qwen3-Next."""

import math

import torch
import torch.nn.functional as F

from fusedlm.config.mixers import GDNConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.context import Context
from fusedlm.nn.conv import ShortConv
from fusedlm.nn.linear import Linear
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.recurrent_state import RecurrentState
from fusedlm.ops.common import Setting
from fusedlm.ops.gated_delta_rule.op import GATED_DELTA_RULE, gated_delta_rule


class GatedDeltaNet(torch.nn.Module):
    def __init__(self, config: GDNConfig, model: ModelConfig, setting: Setting, layer: int):
        super().__init__()
        self.n_heads = config.n_heads
        self.key_dim = config.head_dim or model.dim // config.n_heads
        self.value_dim = config.value_head_dim or self.key_dim
        self.chunk_size = config.chunk_size
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.widths = [keys, keys, values]
        self.qkv = Linear(model.dim, sum(self.widths))
        self.conv = ShortConv(sum(self.widths), config.conv_size)
        self.gates = Linear(model.dim, 2 * self.n_heads)  # a_t and b_t of each head
        self.z = Linear(model.dim, values)
        self.norm = RMSNorm(self.value_dim, model.norm_eps)
        self.out = Linear(values, model.dim, zero=True)
        # As Mamba 2 starts its decay: rates A in [1, 16], steps dt in [0.001, 0.1], so half-lives from 1 to 700 tokens.
        self.log_rate = torch.nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log_())
        dt = torch.exp(torch.empty(self.n_heads).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = torch.nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.rule = GATED_DELTA_RULE.choose(model.impl.gated_delta_rule, setting)

    @property
    def choices(self):
        return [self.rule]

    def forward(self, x_BTD: torch.Tensor, context: Context, state: RecurrentState | None = None) -> torch.Tensor:
        mixed, tail = self.conv(self.qkv(x_BTD), context, None if state is None else state.carried)
        q, k, v = F.silu(mixed).split(self.widths, dim=-1)
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)) for x in (q, k, v))
        q, k = (_unit(x) for x in (q, k))
        step, strength = self.gates(x_BTD).to(self.log_rate.dtype).chunk(2, dim=-1)
        log_decay = -self.log_rate.exp() * F.softplus(step + self.dt_bias)
        y, memory = gated_delta_rule(
            q * self.key_dim**-0.5,
            k,
            v,
            log_decay,
            strength.sigmoid(),
            state_BHKV=None if state is None else state.memory,
            reset_BT=context.reset_BT,
            chunk_size=self.chunk_size,
            implementation=self.rule.function,
        )
        if state is not None:
            state.memory, state.carried = memory, tail
        return self.out((self.norm(y).flatten(-2)) * F.silu(self.z(x_BTD)))

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> RecurrentState:
        return RecurrentState()

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        """The same at every length, once a token has been seen."""
        memory = self.n_heads * self.key_dim * self.value_dim * max(dtype.itemsize, torch.float32.itemsize)
        return (memory + self.conv.state_bytes(dtype)) if n_tokens else 0

    def flops(self, n_tokens: int) -> int:
        """Of the chunked form: products inside a chunk, the triangular solve, three products with the state."""
        size = min(self.chunk_size, n_tokens)
        padded = -(-n_tokens // size) * size
        inside = size * (4 * self.key_dim + 2 * self.value_dim) + size * (self.key_dim + self.value_dim)
        rule = padded * self.n_heads * (inside + 6 * self.key_dim * self.value_dim)
        return rule + sum(linear.flops(n_tokens) for linear in (self.qkv, self.gates, self.z, self.out))

    def rope_specs(self) -> set[tuple[int, float]]:
        return set()


def _unit(x: torch.Tensor) -> torch.Tensor:
    """L2-normalised over the last dimension, in float32 or better; zero stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
