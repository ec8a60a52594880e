"""The section `model` of a recipe: named blocks and the pattern of layers."""

from typing import Annotated

from pydantic import Field, model_validator

from fusedlm.config.ffn import FFNConfig
from fusedlm.config.mixers import AttentionConfig, Mamba2Config, MixerConfig, check_rope_dim
from fusedlm.config.schema import Config, NonNegativeFloat, PositiveFloat, PositiveInt


class YaRNConfig(Config):
    """YaRN (arXiv 2309.00071): rotary embedding for contexts longer than in training."""

    factor: float = Field(ge=1)  # of the context length
    trained_length: PositiveInt  # context length before YaRN, in tokens
    beta_fast: PositiveFloat = 32.0  # frequencies of at least this many turns in trained_length are unchanged
    beta_slow: NonNegativeFloat = 1.0  # those of at most this many turns are divided by factor

    @model_validator(mode="after")
    def _check(self):
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow} is not below beta_fast={self.beta_fast}")
        return self


class BlockConfig(Config):
    """Pre-norm residual block: x + mixer(norm(x)), then x + ffn(norm(x))."""

    mixer: MixerConfig
    ffn: FFNConfig


class ModelConfig(Config):
    """A decoder: token embedding, n_layers blocks by the pattern, norm, language-model head."""

    dim: PositiveInt
    n_layers: PositiveInt
    pattern: str = Field(min_length=1)  # one letter per layer, tiled to n_layers
    blocks: dict[Annotated[str, Field(min_length=1, max_length=1)], BlockConfig] = Field(min_length=1)
    tie_embeddings: bool = True
    logit_softcap: PositiveFloat | None = None  # cap * tanh(logits / cap)
    norm_eps: PositiveFloat = 1e-6
    dropout: float = Field(0.0, ge=0, lt=1)  # in training, on each residual branch and on the embedding
    embedding_std: PositiveFloat | None = None  # None: 0.02, with tied embeddings at most 2 / dim
    embedding_rms: PositiveFloat | None = 1.0  # of the input of the first block; None: embedding_std
    yarn: YaRNConfig | None = None  # for every mixer with rotary embedding
    vocab_multiple: PositiveInt = 64  # the embedding is padded to a multiple of this; padding is never predicted

    @model_validator(mode="after")
    def _check(self):
        unknown = sorted(set(self.pattern) - set(self.blocks))
        if unknown:
            raise ValueError(f"pattern={self.pattern!r}: no block {unknown[0]!r}; blocks has {sorted(self.blocks)}")
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
