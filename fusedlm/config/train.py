"""The train section of a recipe: budget, optimizer, schedule, cadence and hardware."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import Config, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class AdamWConfig(Config):
    """AdamW (arXiv 1711.05101). Norms, biases and embeddings are not decayed."""

    type: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1


class WSDConfig(Config):
    """Warm-up, stable, decay: fractions of all steps; the decay is linear down to `final` times the peak."""

    type: Literal["wsd"] = "wsd"
    warmup: Fraction = 0.01
    decay: Fraction = 0.15
    final: Fraction = 0.1

    @model_validator(mode="after")
    def _check(self):
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} are shares of all steps and pass 1 together")
        return self


class CosineConfig(Config):
    """Linear warm-up over a fraction of all steps, then half a cosine down to `final` times the peak."""

    type: Literal["cosine"] = "cosine"
    warmup: Fraction = 0.01
    final: Fraction = 0.1


OptimizerConfig = AdamWConfig
ScheduleConfig = Annotated[WSDConfig | CosineConfig, Field(discriminator="type")]


class TrainConfig(Config):
    steps: PositiveInt  # optimizer steps
    seq_len: PositiveInt
    batch_size: PositiveInt  # sequences an optimizer step
    micro_batch_size: PositiveInt | None = None  # sequences a forward pass; None: batch_size
    seed: NonNegativeInt = 0
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = WSDConfig()
    grad_clip: PositiveFloat | None = 1.0  # largest norm of the whole gradient
    ema: float | None = Field(None, gt=0, lt=1)  # decay of an exponential moving average of the weights
    max_bad_steps: PositiveInt = 8  # skipped steps in a row (loss or gradient not finite) after which the run stops
    eval_every: NonNegativeInt = 100  # steps between validations; 0: only at the end
    eval_tokens: PositiveInt | None = None  # held-out tokens a validation during training; None: all of them
    checkpoint_every: NonNegativeInt = 100  # steps between checkpoints; 0: only at the end
    keep_checkpoints: PositiveInt = 2  # the newest to keep; the best by validation is kept besides
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on the GPU, float32 on the CPU
    compile: bool = False  # torch.compile, one full graph a block
    cuda_graph: bool = False  # a micro-batch is one launch: for models whose kernels are shorter than their launches
    recompute: Literal["none", "mixer"] = "none"  # mixer: keep its input and attention's output, compute the rest again
    deterministic: bool = False  # refuse any operation whose result can differ between runs
    loggers: list[Literal["tensorboard", "wandb"]] = []

    @model_validator(mode="after")
    def _check(self):
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"micro_batch_size={micro} does not divide batch_size={self.batch_size}")
        if len(set(self.loggers)) != len(self.loggers):
            raise ValueError(f"loggers={self.loggers} names one twice")
        return self
