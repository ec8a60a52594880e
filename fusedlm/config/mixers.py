"""The sequence mixers of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import Config, PositiveInt

RopeBase = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class AttentionConfig(Config):
    """Softmax attention with grouped queries (MHA if n_kv_heads equals n_heads)."""

    type: Literal["attention"] = "attention"
    n_heads: PositiveInt
    n_kv_heads: PositiveInt | None = None  # None: n_heads
    head_dim: PositiveInt | None = None  # None: dim / n_heads
    rope_dim: int | None = Field(None, ge=0)  # leading dimensions with rotary embedding; None: all, 0: none
    rope_base: RopeBase = 10_000.0
    qk_norm: bool = True  # RMSNorm on q and k, with a learned gain per query head
    window: PositiveInt | None = None  # each token attends to itself and the window - 1 tokens before it; None: to all
    xsa: bool = False  # exclusive self-attention: removes the component along the token's own value from the output
    value_residual: bool = False  # mixes in the values of the first layer that has this and the same value width

    @model_validator(mode="after")
    def _check(self):
        _check_divides("n_kv_heads", self.n_kv_heads, self.n_heads)
        check_rope_dim(self.rope_dim, self.head_dim)
        return self


class MLAConfig(Config):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) with decoupled rotary embedding."""

    type: Literal["mla"] = "mla"
    n_heads: PositiveInt
    head_dim: PositiveInt | None = None  # without the rotary part, and of the value; None: dim / n_heads
    kv_rank: PositiveInt
    q_rank: PositiveInt | None = None  # None: queries are projected from the input, without a latent
    rope_dim: int = Field(32, ge=0)
    rope_base: RopeBase = 10_000.0
    n_kv_groups: PositiveInt | None = None  # groups of heads that share an up-projection; None: n_heads
    xsa: bool = False  # as in attention
    value_residual: bool = False  # as in attention, but of the latents of keys and values

    @model_validator(mode="after")
    def _check(self):
        _check_divides("n_kv_groups", self.n_kv_groups, self.n_heads)
        check_rope_dim(self.rope_dim, None)
        return self


class DiffMLAConfig(MLAConfig):
    """Differential attention (arXiv 2410.05258) over one latent: signal and noise have their own queries and keys, and
    share values and rotary parts."""

    type: Literal["diff_mla"] = "diff_mla"
    lambda_form: Literal["static", "token"] = "static"  # one per layer, with head norm; or per token and head, without
    lambda_init: float | None = Field(None, ge=0, lt=1)  # None: 0.8 - 0.6 exp(-0.3 layer), layers counted from 0

    @model_validator(mode="after")
    def _check_lambda(self):
        if self.lambda_form == "token" and self.lambda_init is not None:
            raise ValueError(f"lambda_init={self.lambda_init}: not used with lambda_form=token; remove it")
        return self


class CMDMLAConfig(MLAConfig):
    """Common-mode differential attention: one noise head without position, shared by all signal heads."""

    type: Literal["cmd_mla"] = "cmd_mla"
    noise_dim: PositiveInt | None = None  # of the noise head's query and key; None: head_dim
    lambda_init: float | None = Field(None, ge=0, lt=1)  # None: 0.8 - 0.6 exp(-0.3 layer), layers counted from 0


class GDNConfig(Config):
    """Gated delta net (arXiv 2412.06464)."""

    type: Literal["gdn"] = "gdn"
    n_heads: PositiveInt
    head_dim: PositiveInt | None = None  # of q and k; None: dim / n_heads
    value_head_dim: PositiveInt | None = None  # None: head_dim
    conv_size: PositiveInt = 4  # taps of the causal depthwise convolution on q, k and v
    chunk_size: PositiveInt = 64  # tokens handled in parallel during training


class SDLAConfig(Config):
    """Selective differential linear attention: two streams of linear attention from one low-rank latent, with selective
    decay, and a working memory that is mixed into the output."""

    type: Literal["sdla"] = "sdla"
    n_heads: PositiveInt
    head_dim: PositiveInt | None = None  # without the rotary part, and of the value; None: dim / n_heads
    rank: PositiveInt | None = None  # of the latent of q, k and v; None: dim / 4
    rope_dim: int = Field(16, ge=0)  # of the rotary part of each stream; 0: none
    rope_base: RopeBase = 10_000.0
    lambda_init: float | None = Field(None, ge=0, lt=1)  # None: 0.8 - 0.6 exp(-0.3 layer), layers counted from 0
    memory: bool = True  # whether it has the working memory
    chunk_size: PositiveInt = 64  # tokens handled in parallel during training

    @model_validator(mode="after")
    def _check(self):
        check_rope_dim(self.rope_dim, None)
        return self


class Mamba2Config(Config):
    """Mamba 2, structured state-space duality (arXiv 2405.21060)."""

    type: Literal["mamba2"] = "mamba2"
    n_heads: PositiveInt
    head_dim: PositiveInt | None = None  # of the values; None: 2 * dim / n_heads
    state_dim: PositiveInt = 64  # of B and C, the keys and queries
    n_groups: PositiveInt = 1  # sets of B and C, each shared by n_heads / n_groups heads
    conv_size: PositiveInt = 4  # taps of the causal depthwise convolution on x, B and C
    chunk_size: PositiveInt = 64  # tokens handled in parallel during training

    @model_validator(mode="after")
    def _check(self):
        _check_divides("n_groups", self.n_groups, self.n_heads)
        return self


MixerConfig = Annotated[
    AttentionConfig | MLAConfig | DiffMLAConfig | CMDMLAConfig | GDNConfig | SDLAConfig | Mamba2Config,
    Field(discriminator="type"),
]


def _check_divides(name: str, value: int | None, n_heads: int) -> None:
    if value is not None and n_heads % value:
        raise ValueError(f"{name}={value} does not divide n_heads={n_heads}")


def check_rope_dim(rope_dim: int | None, head_dim: int | None) -> None:
    """Raises ValueError unless rope_dim is even and at most head_dim; None is not checked."""
    if rope_dim is None:
        return
    if rope_dim % 2:
        raise ValueError(f"rope_dim={rope_dim}: must be even")
    if head_dim is not None and rope_dim > head_dim:
        raise ValueError(f"rope_dim={rope_dim}: must be at most head_dim={head_dim}")
