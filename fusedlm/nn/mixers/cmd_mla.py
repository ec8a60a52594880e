"""Common-mode differential attention: one noise head, in the space of the latents, is subtracted from every head."""

import torch
import torch.nn.functional as F

from fusedlm.config.mixers import CMDMLAConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.context import Context
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.mixers.latent import LatentMixer, reach_of
from fusedlm.nn.mixers.softmax import SoftmaxAttention, attention_flops
from fusedlm.ops.attention.op import cached_attention
from fusedlm.ops.common import Setting
from fusedlm.ops.differential_combine.op import DIFFERENTIAL_COMBINE, differential_combine

_STD = 0.1  # of the vectors whose products move lambda
_WIDEST_VALUE = 128  # that the fast kernels on the GPU take


class CommonModeLatentAttention(LatentMixer):
    """norm(A_h V_h - lambda_h B V_h) (1 - lambda_init) in each head h; A_h as in latent attention, B the weights of one
    noise head without position that all heads share.

    V_h is the latent c times W_UV,h, so B V_h = (B c) W_UV,h: the noise is one attention whose values are the latents
    themselves, raised by the projection that it shares with the signal, and is never computed once a head.
    lambda_h = exp(q_h . k_h) - 1 + lambda_init, and starts at lambda_init since the k_h start at zero.
    """

    computes_end_again = True  # from the outputs of attention, which are kept anyway, and at little cost

    def __init__(self, config: CMDMLAConfig, model: ModelConfig, setting: Setting, layer: int):
        noise_dim = config.noise_dim or config.head_dim or model.dim // config.n_heads
        super().__init__(config, model, setting, layer, n_streams=1, noise_dim=noise_dim)
        self.eps = model.norm_eps
        self.lambda_q = torch.nn.Parameter(torch.randn(self.n_heads, self.head_dim) * _STD)
        self.lambda_k = torch.nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        # A buffer, not a number: layers differ in it, and compiled blocks that share a graph must not.
        start = torch.tensor(initial_lambda(config.lambda_init, layer))
        self.register_buffer("lambda_init", start, persistent=False)
        self.gamma = torch.nn.Parameter(torch.ones(self.head_dim))
        self.attend = SoftmaxAttention(
            model.impl, setting, head_dim=self.head_dim + self.rope[0], value_dim=self.head_dim
        )
        self.n_slices = _slices(self.rank) if setting.device.type == "cuda" else 1
        self.attend_noise = SoftmaxAttention(
            model.impl, setting, head_dim=self.noise_dim, value_dim=self.rank // self.n_slices, role="noise_"
        )
        self.combine = DIFFERENTIAL_COMBINE.choose(model.impl.differential_combine, setting)

    @property
    def choices(self):
        return [*super().choices, *self.attend.choices, *self.attend_noise.choices, self.combine]

    def weights(self) -> torch.Tensor:
        """lambda of each head, (H,)."""
        return torch.expm1((self.lambda_q * self.lambda_k).sum(-1)) + self.lambda_init

    def expanded(self, queries, keys, v, latent, q_noise, k_noise, context: Context) -> tuple[torch.Tensor, ...]:
        signal = self.attend(queries[0], keys[0], v, context.scale_scores(self.scale, self.rope[0]), context)
        # Wide latents are cut into slices that the kernel takes: heads with the same query and key.
        q, k = (x[:, :, None].repeat(1, 1, self.n_slices, 1) for x in (q_noise, k_noise))
        slices = latent.unflatten(-1, (self.n_slices, -1))
        return signal, self.attend_noise(q, k, slices, self.noise_dim**-0.5, context).flatten(2)

    def absorbed(self, queries, q_noise, memory, context: Context) -> tuple[torch.Tensor, ...]:
        scale = context.scale_scores(self.scale, self.rope[0])
        # One more head over the same memory. Its scores have a scale of their own and no rotary part.
        noise = (q_noise * (self.noise_dim**-0.5 / scale)) @ self.up_weights()[2].to(q_noise.dtype)
        q = torch.cat([queries[0], F.pad(noise, (0, self.rope[0]))[:, :, None]], dim=2)
        keys = memory[:, :, None]
        read = cached_attention(q, keys, keys[..., : self.rank], scale=scale, reach_BT=reach_of(q, context))
        return self.raised(read[:, :, :-1]), read[:, :, -1]

    def combined(self, x_BTD: torch.Tensor | None, signal_BTHE: torch.Tensor, read_BTR: torch.Tensor) -> torch.Tensor:
        noise_BTGE = self.values(read_BTR)
        if self.n_groups != self.n_heads:
            noise_BTGE = noise_BTGE.repeat_interleave(self.n_heads // self.n_groups, dim=2)
        return differential_combine(
            signal_BTHE,
            noise_BTGE,
            self.weights(),
            self.gamma,
            1 - self.lambda_init,
            eps=self.eps,
            implementation=self.combine.function,
        )

    def flops(self, n_tokens: int) -> int:
        """Of the expanded form, the noise as one head with values as wide as the latent."""
        signal = attention_flops(n_tokens, None, self.n_heads, self.head_dim + self.rope[0], self.head_dim)
        noise = attention_flops(n_tokens, None, 1, self.noise_dim, self.rank)
        raised = 2 * self.rank * self.n_groups * self.head_dim * n_tokens
        return self.projection_flops(n_tokens) + signal + noise + raised


def _slices(rank: int) -> int:
    """The fewest equal slices of the latent that are no wider than the kernel takes."""
    n = -(-rank // _WIDEST_VALUE)
    while rank % n:
        n += 1
    return n
