"""The model section of a recipe: named blocks and the pattern in which they are stacked."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import Config, Fraction, PositiveFloat, PositiveInt


class AttentionConfig(Config):
    """Softmax attention with grouped queries (MHA when n_kv_heads equals n_heads)."""

    type: Literal["attention"] = "attention"
    n_heads: PositiveInt
    n_kv_heads: PositiveInt | None = None  # None: n_heads
    head_dim: PositiveInt | None = None  # None: dim / n_heads
    rope_dim: int | None = Field(None, ge=0)  # leading dimensions that are rotated; None: all of them, 0: none
    rope_base: PositiveFloat = 10_000.0
    qk_norm: bool = True  # RMSNorm on q and k, with a learnt gain per query head
    window: PositiveInt | None = None  # a token sees itself and the window - 1 tokens before it; None: all

    @model_validator(mode="after")
    def _check(self):
        kv_heads = self.n_kv_heads or self.n_heads
        if self.n_heads % kv_heads:
            raise ValueError(f"n_kv_heads={kv_heads} does not divide n_heads={self.n_heads}")
        _check_rope_dim(self.rope_dim, self.head_dim)
        return self


class MLAConfig(Config):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) with a decoupled rotary part."""

    type: Literal["mla"] = "mla"
    n_heads: PositiveInt
    head_dim: PositiveInt | None = None  # of the part without position, and of the value; None: dim / n_heads
    kv_rank: PositiveInt
    q_rank: PositiveInt | None = None  # None: queries straight from the input
    rope_dim: int = Field(32, ge=0)
    rope_base: PositiveFloat = 10_000.0
    n_kv_groups: PositiveInt | None = None  # heads that share an up-projection; None: n_heads

    @model_validator(mode="after")
    def _check(self):
        groups = self.n_kv_groups or self.n_heads
        if self.n_heads % groups:
            raise ValueError(f"n_kv_groups={groups} does not divide n_heads={self.n_heads}")
        _check_rope_dim(self.rope_dim, None)
        return self


class GDNConfig(Config):
    """Gated delta net (arXiv 2412.06464)."""

    type: Literal["gdn"] = "gdn"
    n_heads: PositiveInt
    head_dim: PositiveInt | None = None  # of q and k; None: dim / n_heads
    value_head_dim: PositiveInt | None = None  # None: head_dim
    conv_size: PositiveInt = 4  # taps of the causal depthwise convolution on q, k and v
    chunk_size: PositiveInt = 64  # tokens handled in parallel during training


class SwiGLUConfig(Config):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    type: Literal["swiglu"] = "swiglu"
    hidden: PositiveInt | None = None  # None: 8/3 of dim, rounded up to a multiple of 64


class ReLU2Config(Config):
    """down(leaky_relu(up(x), slope)^2) (arXiv 2109.08668; slope 0 is the published form)."""

    type: Literal["relu2"] = "relu2"
    hidden: PositiveInt | None = None  # None: 4 * dim
    slope: Fraction = 0.0


MixerConfig = Annotated[AttentionConfig | MLAConfig | GDNConfig, Field(discriminator="type")]
FFNConfig = Annotated[SwiGLUConfig | ReLU2Config, Field(discriminator="type")]


class BlockConfig(Config):
    """Pre-norm residual block: x + mixer(norm(x)), then x + ffn(norm(x))."""

    mixer: MixerConfig
    ffn: FFNConfig


class ImplConfig(Config):
    """Which implementation each op runs. `auto` takes the fastest that supports the device and the shapes; naming one
    that cannot run is an error when the model is built."""

    attention: Literal["auto", "cudnn", "flash", "sdpa", "reference"] = "auto"  # plain causal
    packed_attention: Literal["auto", "flash", "sdpa", "reference"] = "auto"  # with document boundaries or a window
    gated_delta_rule: Literal["auto", "reference"] = "auto"
    softcap_cross_entropy: Literal["auto", "reference"] = "auto"


class ModelConfig(Config):
    """One decoder: token embedding, n_layers blocks by the pattern, norm, language-model head."""

    dim: PositiveInt
    n_layers: PositiveInt
    pattern: str = Field(min_length=1)  # one letter a layer, tiled to n_layers
    blocks: dict[Annotated[str, Field(min_length=1, max_length=1)], BlockConfig] = Field(min_length=1)
    tie_embeddings: bool = True
    logit_softcap: PositiveFloat | None = None  # cap * tanh(logits / cap)
    norm_eps: PositiveFloat = 1e-6
    dropout: float = Field(0.0, ge=0, lt=1)  # on each residual branch and on the embedding, while training
    embedding_std: PositiveFloat | None = None  # None: 0.02, with tied embeddings at most 2 / dim
    embedding_rms: PositiveFloat | None = 1.0  # of the embedding as it enters the first block; None: embedding_std
    vocab_multiple: PositiveInt = 64  # rows of the embedding are padded to this; padding is never predicted
    impl: ImplConfig = ImplConfig()

    @model_validator(mode="after")
    def _check(self):
        unknown = sorted(set(self.pattern) - set(self.blocks))
        if unknown:
            raise ValueError(f"pattern={self.pattern!r} names block {unknown[0]!r}; blocks has {sorted(self.blocks)}")
        for name, block in self.blocks.items():
            mixer, where = block.mixer, f"blocks.{name}.mixer"
            if mixer.head_dim is None and self.dim % mixer.n_heads:
                raise ValueError(f"{where}: n_heads={mixer.n_heads} does not divide dim={self.dim}; set head_dim")
            if isinstance(mixer, AttentionConfig):
                _check_rope_dim(mixer.rope_dim, mixer.head_dim or self.dim // mixer.n_heads)
                if mixer.rope_dim is None and (mixer.head_dim or self.dim // mixer.n_heads) % 2:
                    raise ValueError(f"{where}: rotary embedding needs an even head_dim; set rope_dim or head_dim")
        return self

    @property
    def initial_embedding_std(self) -> float:
        """A tied embedding whose residual stream is still the embedding itself gives its own token the logit dim * std;
        at 2 / dim that is 2, and training starts at ln(vocab)."""
        if self.embedding_std is not None:
            return self.embedding_std
        return min(0.02, 2 / self.dim) if self.tie_embeddings else 0.02

    @property
    def embedding_scale(self) -> float:
        """Factor on the embedding as it enters the first block."""
        return 1.0 if self.embedding_rms is None else self.embedding_rms / self.initial_embedding_std

    def layer_blocks(self) -> list[str]:
        """The block name of each layer, first to last."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.n_layers)]


def _check_rope_dim(rope_dim: int | None, head_dim: int | None) -> None:
    if rope_dim is None:
        return
    if rope_dim % 2:
        raise ValueError(f"rope_dim={rope_dim} is odd; rotary embedding turns pairs")
    if head_dim is not None and rope_dim > head_dim:
        raise ValueError(f"rope_dim={rope_dim} exceeds head_dim={head_dim}")
