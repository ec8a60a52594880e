"""The section `train` of a recipe: budget, optimizer, schedule, validation, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import (
    NEUTRAL,
    Config,
    Count,
    CountOrZero,
    Epsilon,
    Fraction,
    Length,
    NonNegativeFloat,
    PositiveFloat,
    Seed,
    Tokens,
)

MAX_STEP_TOKENS, MAX_PASS_TOKENS = 2**28, 2**24

LearningRate = Annotated[float, Field(gt=0, le=1e38)]  # finite in float32


class AdamWConfig(Config):
    """AdamW (arXiv 1711.05101). Weight decay applies to hidden matrices and routers."""

    type: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: LearningRate = 1e-3
    """Learning rate at the peak of the schedule."""
    head_lr: LearningRate | None = None
    """Learning rate of an untied language-model head at the peak of the schedule; null: lr."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    eps: Epsilon = 1e-8
    """Added to the root of the mean of squared gradients."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay, times the learning rate."""


class SGDConfig(Config):
    """Stochastic gradient descent with momentum. Weight decay, of the same parameters as AdamW, is added to the
    gradient."""

    type: Literal["sgd"] = "sgd"
    """The optimizer."""
    lr: LearningRate = 0.1
    """Learning rate at the peak of the schedule."""
    head_lr: LearningRate | None = None
    """Learning rate of an untied language-model head at the peak of the schedule; null: lr."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the sum of gradients; 0: no momentum."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: NonNegativeFloat = 0.0
    """Factor of the weights that are added to the gradient."""

    @model_validator(mode="after")
    def _check(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true: needs momentum greater than 0")
        return self


class WSDConfig(Config):
    """Warm-up, stable, decay. Warm-up and decay are fractions of all steps; linear decay to `final` times the peak."""

    type: Literal["wsd"] = "wsd"
    """The schedule of the learning rate."""
    warmup: Fraction = 0.01
    """Fraction of all steps with linear warm-up."""
    decay: Fraction = 0.15
    """Fraction of all steps with decay, at the end."""
    final: Fraction = 0.1
    """Learning rate of the last step, as a fraction of the peak."""

    @model_validator(mode="after")
    def _check(self):
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup}, decay={self.decay}: fractions of all steps, must sum to at most 1")
        return self


class CosineConfig(Config):
    """Linear warm-up over a fraction of all steps, then half a cosine to `final` times the peak."""

    type: Literal["cosine"] = "cosine"
    """The schedule of the learning rate."""
    warmup: Fraction = 0.01
    """Fraction of all steps with linear warm-up."""
    final: Fraction = 0.1
    """Learning rate of the last step, as a fraction of the peak."""


OptimizerConfig = Annotated[AdamWConfig | SGDConfig, Field(discriminator="type")]
ScheduleConfig = Annotated[WSDConfig | CosineConfig, Field(discriminator="type")]


class TrainConfig(Config):
    """Budget, optimizer, schedule, validation, checkpoints."""

    steps: Count
    """Optimizer steps."""
    seq_len: Length
    """Tokens per sequence."""
    batch_size: int = Field(gt=0, le=2**24)
    """Sequences per optimizer step."""
    micro_batch_size: Annotated[int | None, Field(gt=0, le=2**24), NEUTRAL] = None
    """Sequences per forward pass; null: batch_size."""
    seed: Seed = 0
    """Seed of the weights and of the order of the text."""
    optimizer: OptimizerConfig = AdamWConfig()
    """The optimizer, by its type."""
    schedule: ScheduleConfig = WSDConfig()
    """The schedule of the learning rate, by its type."""
    grad_clip: PositiveFloat | None = 1.0
    """Largest norm of all gradients; null: no clipping."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; null: no average."""
    max_bad_steps: Annotated[Count, NEUTRAL] = 8
    """The run stops after this many skipped steps in a row (loss or gradient not finite)."""
    eval_every: Annotated[CountOrZero, NEUTRAL] = 100
    """Steps between validations; 0: only at the end."""
    eval_tokens: Annotated[Tokens | None, NEUTRAL] = None
    """Held-out tokens per validation; null: all."""
    checkpoint_every: Annotated[CountOrZero, NEUTRAL] = 100
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Annotated[Count, NEUTRAL] = 2
    """Number of newest checkpoints to keep, in addition to the best by validation."""
    loggers: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "csv"]], Field(max_length=10), NEUTRAL] = []
    """Where the metrics go, in addition to metrics.jsonl."""

    @model_validator(mode="after")
    def _check(self):
        if self.batch_size * self.seq_len > MAX_STEP_TOKENS:
            raise ValueError(
                f"batch_size={self.batch_size}, seq_len={self.seq_len}: a step has at most {MAX_STEP_TOKENS} tokens"
            )
        n_sequences = self.micro_batch_size or self.batch_size
        if n_sequences * self.seq_len > MAX_PASS_TOKENS:
            raise ValueError(
                f"micro_batch_size={n_sequences}, seq_len={self.seq_len}: a forward pass has at most {MAX_PASS_TOKENS} "
                "tokens; set a lower micro_batch_size"
            )
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"micro_batch_size={micro} does not divide batch_size={self.batch_size}")
        if len(set(self.loggers)) != len(self.loggers):
            raise ValueError(f"loggers={self.loggers}: a logger is repeated; remove it")
        return self
