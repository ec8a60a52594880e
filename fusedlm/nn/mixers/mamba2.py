"""Mamba 2, the structured state-space model with a scalar decay a head (arXiv 2405.21060)."""

import math

import torch
import torch.nn.functional as F

from fusedlm.config.mixers import Mamba2Config
from fusedlm.config.model import ModelConfig
from fusedlm.nn.context import Context
from fusedlm.nn.conv import ShortConv
from fusedlm.nn.linear import Linear
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.recurrent_state import RecurrentState
from fusedlm.ops.common import Setting
from fusedlm.ops.decayed_linear_attention.op import DECAYED_LINEAR_ATTENTION, chunked_flops, decayed_linear_attention


class Mamba2(torch.nn.Module):
    """x, B and C pass a short convolution and SiLU; with dt = softplus(dt + bias) and a = exp(-dt exp(A_log)) per head

        S_t = a_t S_{t-1} + B_t (dt_t x_t)^T,  y_t = S_t^T C_t + D x_t,

    and the output is W_o norm(y silu(z)), the norm over all heads together.
    """

    def __init__(self, config: Mamba2Config, model: ModelConfig, setting: Setting, layer: int):
        super().__init__()
        self.n_heads, self.n_groups = config.n_heads, config.n_groups
        self.head_dim = config.head_dim or 2 * model.dim // config.n_heads
        self.state_dim = config.state_dim
        self.chunk_size = config.chunk_size
        inner, keys = self.n_heads * self.head_dim, self.n_groups * self.state_dim
        self.widths = [inner, keys, keys]  # x, B, C
        self.project = Linear(model.dim, inner + sum(self.widths) + self.n_heads)  # z, what the convolution takes, dt
        self.conv = ShortConv(sum(self.widths), config.conv_size)
        # Rates A in [1, 16] and steps dt in [0.001, 0.1], as published: half-lives from 1 to 700 tokens.
        self.log_rate = torch.nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log_())
        dt = torch.exp(torch.empty(self.n_heads).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = torch.nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.skip = torch.nn.Parameter(torch.ones(self.n_heads))  # D
        self.norm = RMSNorm(inner, model.norm_eps)
        self.out = Linear(inner, model.dim, zero=True)
        self.rule = DECAYED_LINEAR_ATTENTION.choose(model.impl.decayed_linear_attention, setting)

    @property
    def choices(self):
        return [self.rule]

    @property
    def input_projection(self) -> Linear:
        return self.project

    def forward(self, x_BTD: torch.Tensor, context: Context, state: RecurrentState | None = None) -> torch.Tensor:
        return self.mix(self.project(x_BTD), context, state)

    def mix(self, projected_BTE: torch.Tensor, context: Context, state: RecurrentState | None = None) -> torch.Tensor:
        z, mixed, dt = projected_BTE.split([self.widths[0], sum(self.widths), self.n_heads], dim=-1)
        mixed, tail = self.conv(mixed, context, None if state is None else state.carried)
        x, b, c = F.silu(mixed).split(self.widths, dim=-1)
        x = x.unflatten(-1, (self.n_heads, -1))
        b, c = (y.unflatten(-1, (self.n_groups, -1)) for y in (b, c))
        dt = F.softplus(dt.to(self.log_rate.dtype) + self.dt_bias)
        y, memory = decayed_linear_attention(
            c,
            b,
            (x * dt[..., None]).to(x.dtype),
            -self.log_rate.exp() * dt,
            state_BHKV=None if state is None else state.memory,
            reset_BT=context.reset_BT,
            chunk_size=self.chunk_size,
            implementation=self.rule.function,
        )
        if state is not None:
            state.memory, state.carried = memory, tail
        y = (y + self.skip.to(x.dtype)[:, None] * x).flatten(-2)
        return self.out(self.norm(y * F.silu(z)))

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> RecurrentState:
        return RecurrentState()

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        """The same at every length, once a token has been seen."""
        memory = self.n_heads * self.state_dim * self.head_dim * max(dtype.itemsize, torch.float32.itemsize)
        return (memory + self.conv.state_bytes(dtype)) if n_tokens else 0

    def flops(self, n_tokens: int) -> int:
        rule = chunked_flops(n_tokens, self.chunk_size, self.n_groups, self.n_heads, self.state_dim, self.head_dim)
        return rule + self.project.flops(n_tokens) + self.out.flops(n_tokens)

    def rope_specs(self) -> set[tuple[int, float]]:
        return set()
