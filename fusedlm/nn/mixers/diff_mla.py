"""Differential attention (arXiv 2410.05258) over one latent."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.mixers.latent import LatentMixer
from fusedlm.nn.mixers.softmax import attention_flops
from fusedlm.nn.module import Constant, Module, Normal, OpUse, Role
from fusedlm.nn.norm import rms_norm
from fusedlm.ops import differential_combine

_STD = 0.1  # of the vectors whose products move lambda


class StaticLambda(Module):
    """exp(q1 . k1) - exp(q2 . k2) + lambda_init, one per layer (arXiv 2410.05258, eq. 2).

    The paper draws q and k. Here k starts at zero, so that lambda starts at exactly lambda_init; q is drawn and gives k
    its gradient.
    """

    def __init__(self, width: int, start: float):
        super().__init__()
        self.add_parameter("q", (2, width), Role("lambda"), Normal(_STD))
        self.add_parameter("k", (2, width), Role("lambda"), Constant(0.0))
        self.add_constant("start", start)

    def forward(self, x_BTD) -> tuple[torch.Tensor, torch.Tensor]:
        """lambda (), and the factor 1 - lambda_init () on the normalised heads, which gives them the scale of plain
        attention."""
        plus, minus = (self.q * self.k).sum(-1).exp().unbind()
        return plus - minus + self.start, 1 - self.start

    def flops(self, n_tokens: int) -> int:
        return 0


class TokenLambda(Module):
    """sigmoid(W x), one per token and head; 1/2 at the start. Heads are neither normalised nor scaled."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.project = Linear(dim, n_heads, zero=True)

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.project(x_BTD).sigmoid(), None

    def flops(self, n_tokens: int) -> int:
        return self.project.flops(n_tokens)


class DifferentialLatentAttention(LatentMixer):
    """norm((softmax(S1) - lambda softmax(S2)) V) (1 - lambda_init) in each head; signal S1 and noise S2 have queries
    and keys of their own without position, and share the rotary ones and the values."""

    recomputes_output = True  # cheap, from the outputs of attention, which are saved anyway

    def __init__(self, *, lambda_form: str = "static", lambda_init: float | None = None, layer: int = 0, **latent):
        """Takes the arguments of `LatentMixer` too. lambda_form: "static", or "token" for a lambda per token and head
        without head norm. lambda_init: of the static form; None: by the layer."""
        super().__init__(mixer="diff_mla", n_streams=2, **latent)
        if lambda_form == "static":
            self.noise_weight = StaticLambda(self.head_dim, initial_lambda(lambda_init, layer))
            self.add_parameter("gamma", (self.head_dim,), Role("gain"), Constant(1.0))
        else:
            self.noise_weight = TokenLambda(latent["dim"], self.n_heads)
            self.gamma = None
            self.combines_with_input = True

    def expanded(self, queries, keys, v, latent, q_noise, k_noise, context: Context) -> tuple[torch.Tensor, ...]:
        scale = context.scale_scores(self.scale, self.rope[0])
        return tuple(self.attend(q, k, v, scale, context) for q, k in zip(queries, keys, strict=True))

    def combined(self, x_BTD, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        weight, scale = self.noise_weight(x_BTD)
        backend = self.backend("differential_combine")
        return differential_combine(signal, noise, weight, self.gamma, scale, eps=self.eps, backend=backend)

    def absorbed(self, x_BTD, queries, q_noise, memory, context: Context) -> torch.Tensor:
        weight, scale = self.noise_weight(x_BTD)
        heads = self.head_values(self.attend_memory(queries, memory, context, weight))
        return heads if self.gamma is None else rms_norm(heads, self.eps, self.gamma * scale)

    def flops(self, n_tokens: int) -> int:
        """Of the expanded form."""
        attend = attention_flops(n_tokens, None, 2 * self.n_heads, self.head_dim + self.rope[0], self.head_dim)
        return self.projection_flops(n_tokens) + attend + self.noise_weight.flops(n_tokens)

    def ops(self, device: torch.device) -> list[OpUse]:
        return [*super().ops(device), OpUse("differential_combine", "differential_combine", {})]
