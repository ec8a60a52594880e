"""The section `train` of a recipe: budget, optimizer, schedule, validation, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import (
    NEUTRAL,
    Config,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


class AdamWConfig(Config):
    """AdamW (arXiv 1711.05101). Weight decay applies to hidden matrices and routers."""

    type: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1


class SGDConfig(Config):
    """Stochastic gradient descent with momentum. Weight decay, of the same parameters as AdamW, is added to the
    gradient."""

    type: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true: needs momentum greater than 0")
        return self


class WSDConfig(Config):
    """Warm-up, stable, decay. Warm-up and decay are fractions of all steps; linear decay to `final` times the peak."""

    type: Literal["wsd"] = "wsd"
    warmup: Fraction = 0.01
    decay: Fraction = 0.15
    final: Fraction = 0.1

    @model_validator(mode="after")
    def _check(self):
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup}, decay={self.decay}: fractions of all steps, must sum to at most 1")
        return self


class CosineConfig(Config):
    """Linear warm-up over a fraction of all steps, then half a cosine to `final` times the peak."""

    type: Literal["cosine"] = "cosine"
    warmup: Fraction = 0.01
    final: Fraction = 0.1


OptimizerConfig = Annotated[AdamWConfig | SGDConfig, Field(discriminator="type")]
ScheduleConfig = Annotated[WSDConfig | CosineConfig, Field(discriminator="type")]


class TrainConfig(Config):
    steps: PositiveInt  # optimizer steps
    seq_len: PositiveInt
    batch_size: PositiveInt  # sequences per optimizer step
    micro_batch_size: Annotated[PositiveInt | None, NEUTRAL] = None  # sequences per forward pass; None: batch_size
    seed: NonNegativeInt = 0
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = WSDConfig()
    grad_clip: PositiveFloat | None = 1.0  # largest norm of all gradients; None: no clipping
    ema: float | None = Field(None, gt=0, lt=1)  # decay of an exponential moving average of the weights
    # The run stops after this many skipped steps in a row (loss or gradient not finite).
    max_bad_steps: Annotated[PositiveInt, NEUTRAL] = 8
    eval_every: Annotated[NonNegativeInt, NEUTRAL] = 100  # steps between validations; 0: only at the end
    # Held-out tokens per validation; None: all.
    eval_tokens: Annotated[PositiveInt | None, NEUTRAL] = None
    checkpoint_every: Annotated[NonNegativeInt, NEUTRAL] = 100  # steps between checkpoints; 0: only at the end
    # Number of newest checkpoints to keep, in addition to the best by validation.
    keep_checkpoints: Annotated[PositiveInt, NEUTRAL] = 2
    loggers: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "csv"]], NEUTRAL] = []

    @model_validator(mode="after")
    def _check(self):
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"micro_batch_size={micro} does not divide batch_size={self.batch_size}")
        if len(set(self.loggers)) != len(self.loggers):
            raise ValueError(f"loggers={self.loggers}: a logger is repeated; remove it")
        return self
