"""Common-mode differential attention: one noise head over the latents is subtracted from every head."""

import torch
import torch.nn.functional as F

from fusedlm.nn.context import Context
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.mixers.latent import LatentMixer
from fusedlm.nn.mixers.softmax import SoftmaxAttention, attention_flops, widened_scale
from fusedlm.nn.module import Constant, Normal, OpUse, Role
from fusedlm.nn.norm import rms_norm
from fusedlm.ops import differential_combine

_STD = 0.1  # of the vectors whose products move lambda
_WIDEST_VALUE = 128  # that the fast attention kernels on the GPU take


class CommonModeLatentAttention(LatentMixer):
    """norm(A_h V_h - lambda_h B V_h) (1 - lambda_init) in each head h; A_h as in latent attention, B those of one noise
    head without position, shared by all heads.

    V_h is the latent c times W_UV,h, so B V_h = (B c) W_UV,h: the noise is one attention whose values are the latents
    themselves, followed by the projection that it shares with the signal, and is never computed once per head.
    lambda_h = exp(q_h . k_h) - 1 + lambda_init, and starts at lambda_init since the k_h start at zero.
    """

    recomputes_output = True  # cheap, from the outputs of attention, which are saved anyway

    def __init__(self, *, noise_dim: int | None = None, lambda_init: float | None = None, layer: int = 0, **latent):
        """Takes the arguments of `LatentMixer` too. noise_dim: width of the noise head's query and key; None: head_dim.
        lambda_init: None: by the layer."""
        noise_dim = noise_dim or latent.get("head_dim") or latent["dim"] // latent["n_heads"]
        super().__init__(mixer="cmd_mla", noise_dim=noise_dim, **latent)
        self.noise_scale = noise_dim**-0.5
        shape = (self.n_heads, self.head_dim)
        self.add_parameter("lambda_q", shape, Role("lambda"), Normal(_STD))
        self.add_parameter("lambda_k", shape, Role("lambda"), Constant(0.0))
        self.add_constant("lambda_init", initial_lambda(lambda_init, layer))
        self.add_parameter("gamma", (self.head_dim,), Role("gain"), Constant(1.0))
        self.attend_noise = SoftmaxAttention(self.noise_dim, self.rank, role="noise_")

    def widen_from(self, base: "CommonModeLatentAttention") -> None:
        super().widen_from(base)
        self.noise_scale = widened_scale(self.noise_scale, base.noise_scale)

    def n_slices(self, device: torch.device) -> int:
        """The number of equal parts of the latent that serve as values of heads with the same query and key: the fewest
        that the fast kernels of a GPU take."""
        return _slices(self.rank) if device.type == "cuda" else 1

    def noise_weights(self) -> torch.Tensor:
        """lambda of each head, (H,)."""
        return torch.expm1((self.lambda_q * self.lambda_k).sum(-1)) + self.lambda_init

    def expanded(self, queries, keys, v, latent, q_noise, k_noise, context: Context) -> tuple[torch.Tensor, ...]:
        signal = self.attend(queries[0], keys[0], v, context.scale_scores(self.scale, self.rope[0]), context)
        n_slices = self.n_slices(latent.device)
        q, k = (x[:, :, None].repeat(1, 1, n_slices, 1) for x in (q_noise, k_noise))
        slices = latent.unflatten(-1, (n_slices, -1))
        return signal, self.attend_noise(q, k, slices, self.noise_scale, context).flatten(2)

    def combined(self, x_BTD, signal_BTHE: torch.Tensor, read_BTR: torch.Tensor) -> torch.Tensor:
        noise_BTGE = self.values(read_BTR)
        if self.n_groups != self.n_heads:
            noise_BTGE = noise_BTGE.repeat_interleave(self.n_heads // self.n_groups, dim=2)
        return differential_combine(
            signal_BTHE,
            noise_BTGE,
            self.noise_weights(),
            self.gamma,
            1 - self.lambda_init,
            eps=self.eps,
            backend=self.backend("differential_combine"),
        )

    def absorbed(self, x_BTD, queries, q_noise, memory, context: Context) -> torch.Tensor:
        scale = context.scale_scores(self.scale, self.rope[0])
        # One more head over the same memory. Its scores have a scale of their own and no rotary part.
        noise = self.kv_up(q_noise * (self.noise_scale / scale), part="noise", transposed=True)
        noise = F.pad(noise, (0, self.rope[0]))[:, :, None]
        heads = self.head_values(self.attend_memory([*queries, noise], memory, context, self.noise_weights()))
        return rms_norm(heads, self.eps, self.gamma * (1 - self.lambda_init))

    def flops(self, n_tokens: int) -> int:
        """Of the expanded form, the noise as one head with values as wide as the latent."""
        signal = attention_flops(n_tokens, None, self.n_heads, self.head_dim + self.rope[0], self.head_dim)
        noise = attention_flops(n_tokens, None, 1, self.noise_dim, self.rank)
        noise_values = 2 * self.rank * self.n_groups * self.head_dim * n_tokens
        return self.projection_flops(n_tokens) + signal + noise + noise_values

    def ops(self, device: torch.device) -> list[OpUse]:
        widths = {"head_dim": self.noise_dim, "value_dim": self.rank // self.n_slices(device)}
        noise = [use._replace(sizes=widths) for use in self.attend_noise.ops(device)]
        return [*super().ops(device), *noise, OpUse("differential_combine", "differential_combine", {})]


def _slices(rank: int) -> int:
    """The fewest equal slices of the latent that are no wider than _WIDEST_VALUE."""
    n = -(-rank // _WIDEST_VALUE)
    while rank % n:
        n += 1
    return n
