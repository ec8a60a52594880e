"""Differential attention (arXiv 2410.05258) over one latent."""

import torch

from fusedlm.config.mixers import DiffMLAConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.mixers.latent import LatentMixer, reach_of
from fusedlm.nn.mixers.softmax import SoftmaxAttention, attention_flops
from fusedlm.ops.attention.op import cached_attention
from fusedlm.ops.common import Setting
from fusedlm.ops.differential_combine.op import DIFFERENTIAL_COMBINE, differential_combine

_STD = 0.1  # of the vectors whose products move lambda


class StaticLambda(torch.nn.Module):
    """exp(q1 . k1) - exp(q2 . k2) + lambda_init, one a layer (arXiv 2410.05258, eq. 2).

    The k vectors start at zero where the paper draws them too: lambda then starts at lambda_init itself, and the q
    vectors, which are drawn, give the k their gradient.
    """

    def __init__(self, width: int, start: float):
        super().__init__()
        self.q = torch.nn.Parameter(torch.randn(2, width) * _STD)
        self.k = torch.nn.Parameter(torch.zeros(2, width))
        # A buffer, not a number: layers differ in it, and compiled blocks that share a graph must not.
        self.register_buffer("start", torch.tensor(start), persistent=False)

    def forward(self, x_BTD: torch.Tensor | None) -> torch.Tensor:
        plus, minus = (self.q * self.k).sum(-1).exp().unbind()
        return plus - minus + self.start

    def scale(self) -> torch.Tensor:
        """Of the normalised heads: what keeps their size that of plain attention."""
        return 1 - self.start

    def flops(self, n_tokens: int) -> int:
        return 0


class TokenLambda(torch.nn.Module):
    """sigmoid(W x), one a token and head; 1/2 at the start. Heads are then neither normalised nor scaled."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.project = Linear(dim, n_heads, zero=True)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.project(x_BTD).sigmoid()

    def scale(self) -> None:
        return None

    def flops(self, n_tokens: int) -> int:
        return self.project.flops(n_tokens)


class DifferentialLatentAttention(LatentMixer):
    """norm((softmax(S1) - lambda softmax(S2)) V) (1 - lambda_init) in each head; signal S1 and noise S2 have queries
    and keys of their own without position, and share the rotary ones and the values."""

    computes_end_again = True  # from the outputs of attention, which are kept anyway, and at little cost

    def __init__(self, config: DiffMLAConfig, model: ModelConfig, setting: Setting, layer: int):
        super().__init__(config, model, setting, layer, n_streams=2)
        self.eps = model.norm_eps
        self.gamma = None
        if config.lambda_form == "static":
            self.weight = StaticLambda(self.head_dim, initial_lambda(config.lambda_init, layer))
            self.gamma = torch.nn.Parameter(torch.ones(self.head_dim))
        else:
            self.weight = TokenLambda(model.dim, self.n_heads)
            self.ends_with_input = True
        self.attend = SoftmaxAttention(
            model.impl, setting, head_dim=self.head_dim + self.rope[0], value_dim=self.head_dim
        )
        self.combine = DIFFERENTIAL_COMBINE.choose(model.impl.differential_combine, setting)

    @property
    def choices(self):
        return [*super().choices, *self.attend.choices, self.combine]

    def expanded(self, queries, keys, v, latent, q_noise, k_noise, context: Context) -> tuple[torch.Tensor, ...]:
        scale = context.scale_scores(self.scale, self.rope[0])
        return tuple(self.attend(q, k, v, scale, context) for q, k in zip(queries, keys, strict=True))

    def absorbed(self, queries, q_noise, memory, context: Context) -> tuple[torch.Tensor, ...]:
        q = torch.cat(queries, dim=2)  # 2 H heads, one read of the memory
        keys = memory[:, :, None]
        scale = context.scale_scores(self.scale, self.rope[0])
        read = cached_attention(q, keys, keys[..., : self.rank], scale=scale, reach_BT=reach_of(q, context))
        return tuple(self.raised(half) for half in read.chunk(2, dim=2))

    def combined(self, x_BTD: torch.Tensor | None, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return differential_combine(
            signal,
            noise,
            self.weight(x_BTD),
            self.gamma,
            self.weight.scale(),
            eps=self.eps,
            implementation=self.combine.function,
        )

    def flops(self, n_tokens: int) -> int:
        """Of the expanded form."""
        attend = attention_flops(n_tokens, None, 2 * self.n_heads, self.head_dim + self.rope[0], self.head_dim)
        return self.projection_flops(n_tokens) + attend + self.weight.flops(n_tokens)
