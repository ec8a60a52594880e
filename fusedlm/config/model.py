"""The model section of a recipe: named blocks and the pattern in which they are stacked."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.ffn import FFNConfig
from fusedlm.config.mixers import AttentionConfig, Mamba2Config, MixerConfig, check_rope_dim
from fusedlm.config.schema import Config, NonNegativeFloat, PositiveFloat, PositiveInt


class YaRNConfig(Config):
    """YaRN (arXiv 2309.00071): rotary embedding stretched to contexts longer than trained."""

    factor: float = Field(ge=1)  # by which the context is stretched
    trained_length: PositiveInt  # context of the training before the stretch, in tokens
    beta_fast: PositiveFloat = 32.0  # turns within trained_length from which a frequency is left as it is
    beta_slow: NonNegativeFloat = 1.0  # turns up to which it is divided by factor

    @model_validator(mode="after")
    def _check(self):
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow} is not below beta_fast={self.beta_fast}")
        return self


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
    decayed_linear_attention: Literal["auto", "reference"] = "auto"  # of sdla and mamba2
    gated_scan: Literal["auto", "reference"] = "auto"  # of sdla's working memory
    differential_combine: Literal["auto", "triton", "reference"] = "auto"  # of diff_mla and cmd_mla
    linear_softcap_cross_entropy: Literal["auto", "chunked", "reference"] = "auto"  # training; reference: all logits
    relu2_mlp: Literal["auto", "triton", "reference"] = "auto"
    # Compiled, the reference is faster where the projection is narrow (docs/results.md).
    rmsnorm_linear: Literal["auto", "packed", "triton", "reference"] = "reference"
    softcap_cross_entropy: Literal["auto", "triton", "reference"] = "auto"
    swiglu_mlp: Literal["auto", "triton", "reference"] = "reference"  # compiled, that does nearly what triton does


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
    yarn: YaRNConfig | None = None  # for every mixer with rotary embedding
    vocab_multiple: PositiveInt = 64  # rows of the embedding are padded to this; padding is never predicted
    impl: ImplConfig = ImplConfig()

    @model_validator(mode="after")
    def _check(self):
        unknown = sorted(set(self.pattern) - set(self.blocks))
        if unknown:
            raise ValueError(f"pattern={self.pattern!r} names block {unknown[0]!r}; blocks has {sorted(self.blocks)}")
        for name, block in self.blocks.items():
            mixer, where = block.mixer, f"blocks.{name}.mixer"
            width = 2 * self.dim if isinstance(mixer, Mamba2Config) else self.dim
            if mixer.head_dim is None and width % mixer.n_heads:
                raise ValueError(f"{where}: n_heads={mixer.n_heads} does not divide dim={self.dim}; set head_dim")
            if isinstance(mixer, AttentionConfig):
                check_rope_dim(mixer.rope_dim, mixer.head_dim or self.dim // mixer.n_heads)
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
