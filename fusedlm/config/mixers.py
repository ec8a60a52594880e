"""The sequence mixers of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import Config, Dim, HeadCount, HeadDim, Length, RopeDim

RopeBase = Annotated[float, Field(gt=1, le=1e12)]
ConvSize = Annotated[int, Field(gt=0, le=1024)]
ChunkSize = Annotated[int, Field(gt=0, le=2**16)]


class AttentionConfig(Config):
    """Softmax attention with grouped queries (MHA if n_kv_heads equals n_heads)."""

    type: Literal["attention"] = "attention"
    """The mixer."""
    n_heads: HeadCount
    """Query heads."""
    n_kv_heads: HeadCount | None = None
    """Heads of keys and values, each shared by n_heads / n_kv_heads query heads; null: n_heads."""
    head_dim: HeadDim | None = None
    """Width of a head; null: dim / n_heads."""
    rope_dim: RopeDim | None = None
    """Leading dimensions of a head with rotary embedding; null: all, 0: none."""
    rope_base: RopeBase = 10_000.0
    """Base of the frequencies of the rotary embedding."""
    qk_norm: bool = True
    """RMSNorm on q and k, with learned gains."""
    qk_gain: Literal["head", "dim", "none"] = "head"
    """Gains of qk_norm. head: one per query head; dim: one per dimension of q and of k, for all heads (Qwen3); none:
    no gains (nanochat)."""
    window: Length | None = None
    """Each token attends to itself and the window - 1 tokens before it; null: to all."""
    output_gate: bool = False
    """Multiplies the output of the heads by sigmoid(W x), element by element, before the last projection
    (arXiv 2505.06708)."""
    xsa: bool = False
    """Exclusive self-attention: removes the component along the token's own value from the output."""
    value_residual: bool = False
    """Mixes in the values of the first layer that has this and the same value width."""
    value_embedding: Dim | None = None
    """Width of a table of all tokens, shared by all layers with this, whose projected rows are added to the values;
    null: none."""

    @model_validator(mode="after")
    def _check(self):
        _check_divides("n_kv_heads", self.n_kv_heads, self.n_heads)
        check_rope_dim(self.rope_dim, self.head_dim)
        if self.qk_gain != "head" and not self.qk_norm:
            raise ValueError(f"qk_gain={self.qk_gain}: not used with qk_norm=false; remove it, or set qk_norm=true")
        return self


class MLAConfig(Config):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) with decoupled rotary embedding."""

    type: Literal["mla"] = "mla"
    """The mixer."""
    n_heads: HeadCount
    """Heads."""
    head_dim: HeadDim | None = None
    """Width of a head without the rotary part, and of its value; null: dim / n_heads."""
    kv_rank: Dim
    """Width of the latent of keys and values, which the decoding state holds per token."""
    q_rank: Dim | None = None
    """Width of the latent of queries; null: queries are projected from the input, without a latent."""
    rope_dim: RopeDim = 32
    """Width of the rotary part of queries and keys; 0: none."""
    rope_base: RopeBase = 10_000.0
    """Base of the frequencies of the rotary embedding."""
    n_kv_groups: HeadCount | None = None
    """Groups of heads that share an up-projection; null: n_heads."""
    xsa: bool = False
    """Exclusive self-attention: removes the component along the token's own value from the output."""
    value_residual: bool = False
    """Mixes in the latents of keys and values of the first layer that has this and the same width."""

    @model_validator(mode="after")
    def _check(self):
        _check_divides("n_kv_groups", self.n_kv_groups, self.n_heads)
        check_rope_dim(self.rope_dim, None)
        return self


class DiffMLAConfig(MLAConfig):
    """Differential attention (arXiv 2410.05258) over one latent: signal and noise have their own queries and keys, and
    share values and rotary parts."""

    type: Literal["diff_mla"] = "diff_mla"
    """The mixer."""
    lambda_form: Literal["static", "token"] = "static"
    """static: one lambda per layer, with head norm; token: one per token and head, without."""
    lambda_init: float | None = Field(None, ge=0, lt=1)
    """Initial lambda; null: 0.8 - 0.6 exp(-0.3 layer), layers counted from 0."""

    @model_validator(mode="after")
    def _check_lambda(self):
        if self.lambda_form == "token" and self.lambda_init is not None:
            raise ValueError(f"lambda_init={self.lambda_init}: not used with lambda_form=token; remove it")
        return self


class CMDMLAConfig(MLAConfig):
    """Common-mode differential attention: one noise head without position, shared by all signal heads."""

    type: Literal["cmd_mla"] = "cmd_mla"
    """The mixer."""
    noise_dim: HeadDim | None = None
    """Width of the noise head's query and key; null: head_dim."""
    lambda_init: float | None = Field(None, ge=0, lt=1)
    """Initial lambda; null: 0.8 - 0.6 exp(-0.3 layer), layers counted from 0."""


class GDNConfig(Config):
    """Gated delta net (arXiv 2412.06464)."""

    type: Literal["gdn"] = "gdn"
    """The mixer."""
    n_heads: HeadCount
    """Heads."""
    head_dim: HeadDim | None = None
    """Width of q and k of a head; null: dim / n_heads."""
    value_head_dim: HeadDim | None = None
    """Width of v of a head; null: head_dim."""
    conv_size: ConvSize = 4
    """Taps of the causal depthwise convolution on q, k and v."""
    chunk_size: ChunkSize = 64
    """Tokens computed in parallel during training."""


class SDLAConfig(Config):
    """Selective differential linear attention: two streams of linear attention from one low-rank latent, with selective
    decay, and a working memory that is mixed into the output."""

    type: Literal["sdla"] = "sdla"
    """The mixer."""
    n_heads: HeadCount
    """Heads."""
    head_dim: HeadDim | None = None
    """Width of a head without the rotary part, and of its value; null: dim / n_heads."""
    rank: Dim | None = None
    """Width of the latent of q, k and v; null: dim / 4."""
    rope_dim: RopeDim = 16
    """Width of the rotary part of each stream; 0: none."""
    rope_base: RopeBase = 10_000.0
    """Base of the frequencies of the rotary embedding."""
    lambda_init: float | None = Field(None, ge=0, lt=1)
    """Initial lambda; null: 0.8 - 0.6 exp(-0.3 layer), layers counted from 0."""
    memory: bool = True
    """Whether it has the working memory."""
    chunk_size: ChunkSize = 64
    """Tokens computed in parallel during training."""

    @model_validator(mode="after")
    def _check(self):
        check_rope_dim(self.rope_dim, None)
        return self


class Mamba2Config(Config):
    """Mamba 2, structured state-space duality (arXiv 2405.21060)."""

    type: Literal["mamba2"] = "mamba2"
    """The mixer."""
    n_heads: HeadCount
    """Heads."""
    head_dim: HeadDim | None = None
    """Width of the values of a head; null: 2 * dim / n_heads."""
    state_dim: HeadDim = 64
    """Width of B and C, the keys and queries."""
    n_groups: HeadCount = 1
    """Sets of B and C, each shared by n_heads / n_groups heads."""
    conv_size: ConvSize = 4
    """Taps of the causal depthwise convolution on x, B and C."""
    chunk_size: ChunkSize = 64
    """Tokens computed in parallel during training."""

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
