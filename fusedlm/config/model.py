"""The section `model` of a recipe: named blocks and the pattern of layers."""

from functools import reduce
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fusedlm.config.ffn import FFNConfig, MoEConfig
from fusedlm.config.mixers import AttentionConfig, Mamba2Config, MixerConfig, check_rope_dim
from fusedlm.config.schema import (
    Config,
    Dim,
    Epsilon,
    Fraction,
    Length,
    NonNegativeFloat,
    PositiveFloat,
    Scale,
    ShortText,
    TypeText,
)

MAX_LAYERS = 1024


def _check_block_name(value: str) -> str:
    if len(value) != 1 or not value.isalnum():
        raise ValueError(f"got {value!r}, the name of a block is one letter or digit")
    return value


BlockName = Annotated[str, AfterValidator(_check_block_name), TypeText("letter")]


class YaRNConfig(Config):
    """YaRN (arXiv 2309.00071): rotary embedding for contexts longer than in training."""

    factor: float = Field(ge=1, le=1e6)
    """Factor of the context length."""
    trained_length: Length
    """Context length before YaRN, in tokens."""
    beta_fast: PositiveFloat = 32.0
    """Frequencies of at least this many turns in trained_length are unchanged."""
    beta_slow: NonNegativeFloat = 1.0
    """Frequencies of at most this many turns in trained_length are divided by factor."""

    @model_validator(mode="after")
    def _check(self):
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow} is not below beta_fast={self.beta_fast}")
        return self


class BigramConfig(Config):
    """Hashed bigram embedding: a table of the hashes of a token and the one before it, projected to `dim` and added to
    the token embedding."""

    rows: int = Field(2048, ge=2, le=2**24)
    """Rows of the table; the last one is for the first tokens of documents."""
    dim: Dim = 128
    """Width of the table."""


class RescaleConfig(Config):
    """Asymmetric cap: logits are scale * sigmoid((logits + shift) / width)."""

    scale: Scale = 23.0
    """Upper bound of the logits; the lower one is 0."""
    shift: float = Field(5.0, ge=-1e6, le=1e6)
    """Added to the logits."""
    width: Scale = 7.5
    """Divides them after that."""


class BlockConfig(Config):
    """Pre-norm residual block: x + mixer(norm(x)), then x + ffn(norm(x)) where there is a feed-forward."""

    mixer: MixerConfig
    """The sequence mixer, by its type."""
    ffn: FFNConfig
    """The feed-forward, by its type; none: there is none."""


class MTPConfig(Config):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): modules that predict further tokens in
    training, and that draft tokens in generation."""

    depth: int = Field(1, ge=0, le=16)
    """Number of modules, each of which looks one token further; 0: none."""
    block: BlockName | None = None
    """Block of every module, by its letter; null: that of the last layer."""
    weight: NonNegativeFloat = 0.3
    """Weight of the modules' loss."""
    final_weight: NonNegativeFloat | None = 0.1
    """Weight from final_from on; null: the same as weight."""
    final_from: Fraction = 0.68
    """Fraction of all steps after which final_weight takes the place of weight."""
    depth_weights: list[NonNegativeFloat] | None = Field(None, max_length=16)
    """Factor of each module's loss in theirs; null: the mean of all, 1 / depth each."""

    @model_validator(mode="after")
    def _check(self):
        if self.depth_weights is not None and len(self.depth_weights) != self.depth:
            raise ValueError(f"depth_weights={self.depth_weights}: needs depth={self.depth} numbers, one per module")
        return self

    def weight_at(self, step: int, steps: int) -> float:
        """The weight in a step, counted from 0, of so many."""
        if self.final_weight is None or step < round(self.final_from * steps):
            return self.weight
        return self.final_weight


class MuPConfig(Config):
    """Maximal update parametrisation (arXiv 2203.03466, 2310.17813): rates, start and scales that are tuned at
    base_width hold at other widths. At base_width nothing changes."""

    base_width: Dim
    """model.dim of the width at which it is the standard parametrisation."""
    base: dict[ShortText, Annotated[int, Field(ge=0, le=2**24)]] = Field({}, max_length=100)
    """Numbers of the model that are others at base_width, by key: {blocks.a.mixer.n_heads: 4}. All else but dim is the
    same, and does not grow."""
    base_depth: int | None = Field(None, gt=0, le=MAX_LAYERS)
    """n_layers at which residual branches have the factor 1; null: at every depth."""
    depth_exponent: Fraction = 1.0
    """Residual branches are multiplied by (n_layers / base_depth)^-depth_exponent; 1: CompleteP (arXiv 2505.01618)."""


class ModelConfig(Config):
    """A decoder: token embedding, n_layers blocks by the pattern, norm, language-model head."""

    dim: Dim
    """Width of the hidden states."""
    n_layers: int = Field(gt=0, le=MAX_LAYERS)
    """Number of blocks."""
    pattern: str = Field(min_length=1, max_length=MAX_LAYERS)
    """Block of each layer: one letter per layer, tiled to n_layers."""
    blocks: dict[BlockName, BlockConfig] = Field(min_length=1, max_length=64)
    """Blocks by their letter in the pattern, which is one letter or digit."""
    tie_embeddings: bool = True
    """Whether the language-model head uses the token embedding as its weight."""
    logit_softcap: Scale | None = None
    """Logits are cap * tanh(logits / cap); null: not capped."""
    logit_rescale: RescaleConfig | None = None
    """Asymmetric cap of the logits, in place of logit_softcap; null: none."""
    norm_eps: Epsilon = 1e-6
    """Added to the mean square in norms."""
    norm_gain: bool = True
    """Learned gains of the norms of the blocks and of the last norm; false: these have none."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in training, on each residual branch and on the embedding."""
    embedding_std: Scale | None = None
    """Standard deviation of the initial embedding; null: 0.02, with tied embeddings at most 2 / dim."""
    embedding_rms: Scale | None = 1.0
    """Root mean square of the input of the first block; null: embedding_std."""
    embedding_norm: bool = False
    """RMSNorm without gain of the input of the first block, in place of embedding_rms, which is not used."""
    yarn: YaRNConfig | None = None
    """YaRN, for every mixer with rotary embedding; null: none."""
    bigram: BigramConfig | None = None
    """Hashed bigram embedding; null: none."""
    smear: bool = False
    """Mixes each embedding with the one before it, by a learned gate per dimension."""
    x0_mixing: bool = False
    """Mixes the input of the first block into that of every block, with learned weights per dimension."""
    unet_skips: bool = False
    """Adds the outputs of the first half of the blocks, last first, to the inputs of the second half, with learned
    weights per dimension."""
    depth_scaled_norms: bool = False
    """Multiplies the outputs of a block's norms by 1 / sqrt(layer + 1), layers counted from 0."""
    init: Literal["normal", "orthogonal"] = "normal"
    """Initial hidden matrices: normal, or orthogonal where both sides of a projection have at least 64."""
    mup: MuPConfig | None = None
    """Maximal update parametrisation; null: standard parametrisation."""
    mtp: MTPConfig | None = None
    """Multi-token prediction; null: none."""
    vocab_multiple: int = Field(64, gt=0, le=2**16)
    """The embedding is padded to a multiple of this; padding is never predicted."""

    @model_validator(mode="after")
    def _check(self):
        if self.logit_rescale is not None and self.logit_softcap is not None:
            raise ValueError(f"logit_softcap={self.logit_softcap}: logits have one cap; remove it or logit_rescale")
        if self.unet_skips and self.n_layers < 2:
            raise ValueError(f"unet_skips=true: needs at least 2 layers, not n_layers={self.n_layers}")
        unknown = sorted(set(self.pattern) - set(self.blocks))
        if unknown:
            raise ValueError(f"pattern={self.pattern!r}: no block {unknown[0]!r}; blocks has {sorted(self.blocks)}")
        if self.mtp is not None and self.mtp.block not in (None, *self.blocks):
            raise ValueError(f"mtp.block={self.mtp.block!r}: no such block; blocks has {sorted(self.blocks)}")
        value_width = None
        for name, block in self.blocks.items():
            mixer, where = block.mixer, f"blocks.{name}.mixer"
            width = 2 * self.dim if isinstance(mixer, Mamba2Config) else self.dim
            if mixer.head_dim is None and width % mixer.n_heads:
                raise ValueError(f"{where}: n_heads={mixer.n_heads} does not divide dim={self.dim}; set head_dim")
            if isinstance(mixer, AttentionConfig):
                value_width = value_width or mixer.value_embedding
                if mixer.value_embedding not in (None, value_width):
                    raise ValueError(
                        f"{where}: value_embedding={mixer.value_embedding} must be {value_width} as in another block: "
                        "all share one table"
                    )
                check_rope_dim(mixer.rope_dim, mixer.head_dim or self.dim // mixer.n_heads)
                if mixer.rope_dim is None and (mixer.head_dim or self.dim // mixer.n_heads) % 2:
                    raise ValueError(f"{where}: rotary embedding needs an even head_dim; set rope_dim or head_dim")
        if self.mup is not None:
            self.at_base_width()
        return self

    def mixtures(self) -> dict[str, MoEConfig]:
        """The feed-forwards with routed experts, by the letter of their block; those of blocks that are used."""
        used = {self.pattern[i % len(self.pattern)] for i in range(self.n_layers)}
        if self.mtp is not None and self.mtp.depth and self.mtp.block is not None:
            used.add(self.mtp.block)
        ffns = {name: block.ffn for name, block in self.blocks.items() if name in used}
        return {name: ffn for name, ffn in ffns.items() if isinstance(ffn, MoEConfig) and ffn.n_experts}

    def at_base_width(self) -> "ModelConfig":
        """The same model at the base width of its `mup`, in standard parametrisation.

        Raises:
            ValueError: it is not valid at that width.
        """
        tree = self.model_dump() | {"dim": self.mup.base_width, "mup": None}
        for key, value in self.mup.base.items():
            *above, name = key.split(".")
            section = reduce(lambda one, part: one.get(part) if isinstance(one, dict) else None, above, tree)
            if not isinstance(section, dict) or name not in section or not isinstance(section[name], int | None):
                raise ValueError(f"mup.base: {key!r} is no number of the model; write blocks.a.mixer.n_heads, say")
            section[name] = value
        try:
            return type(self).model_validate(tree)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"mup.base_width={self.mup.base_width}: at that width, {problem}") from None
