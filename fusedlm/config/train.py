"""The section `train` of a recipe: budget, optimizer, schedule, validation, checkpoints."""

import math
from itertools import pairwise
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
    PathText,
    PositiveFloat,
    Seed,
    Tokens,
)

MAX_STEP_TOKENS, MAX_PASS_TOKENS = 2**28, 2**24

LearningRate = Annotated[float, Field(gt=0, le=1e38)]  # finite in float32


class _OneRateConfig(Config):
    def rates(self) -> dict[str, float]:
        """Every peak learning rate by its key."""
        return {"lr": self.lr}

    def with_lr(self, lr: float):
        """With this peak learning rate, and that of the head in proportion."""
        return self.model_copy(update={"lr": lr, "head_lr": _times(self.head_lr, lr / self.lr)})

    @property
    def head_rate(self) -> tuple[str, float | None]:
        """Key and value of the head's own learning rate."""
        return "head_lr", self.head_lr


def _times(rate: float | None, factor: float) -> float | None:
    return None if rate is None else rate * factor


class AdamWConfig(_OneRateConfig):
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
    cautious: bool = False
    """Weight decay only where the update and the weight have the same sign (arXiv 2510.12402)."""


class SGDConfig(_OneRateConfig):
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


class MuonConfig(Config):
    """Muon: momentum, orthogonalised and scaled (docs/optimizers.md)."""

    lr: LearningRate = 0.02
    """Learning rate at the peak of the schedule."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the mean of gradients; 0: the gradient itself."""
    nesterov: bool = True
    """Nesterov's momentum."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay, times the learning rate."""
    cautious: bool = False
    """Weight decay only where the update and the weight have the same sign (arXiv 2510.12402)."""
    scheme: Literal["quintic", "polar_express", "turbo"] = "polar_express"
    """The polynomials that orthogonalise: 5 steps of one, 5 of Polar Express, or 4 of these after preconditioning."""
    scaling: Literal["shape", "spectral", "rms"] = "spectral"
    """Factor of the orthogonal update: shape is sqrt(max(1, out/in)), spectral sqrt(out/in), rms 0.2 sqrt(max(out,
    in)), with which learning rates of AdamW carry over."""

    @model_validator(mode="after")
    def _check_nesterov(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true: needs momentum greater than 0")
        return self


class NorMuonConfig(MuonConfig):
    """NorMuon: Muon whose update is divided by the root mean square of its rows over steps (arXiv 2510.05491)."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the mean of the rows' squared updates."""


class RestConfig(Config):
    """AdamW of the parameters that are not hidden matrices. Weight decay applies to routers."""

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
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, times the learning rate."""
    cautious: bool = False
    """Weight decay only where the update and the weight have the same sign (arXiv 2510.12402)."""


class _TwoRateConfig(Config):
    def rates(self) -> dict[str, float]:
        """Every peak learning rate by its key, that of hidden matrices first."""
        return {"matrix.lr": self.matrix.lr, "rest.lr": self.rest.lr}

    def with_lr(self, lr: float):
        """With this peak learning rate of hidden matrices, and that of the rest in proportion."""
        factor = lr / self.matrix.lr
        matrix = self.matrix.model_copy(update={"lr": lr})
        changes = {"lr": self.rest.lr * factor, "head_lr": _times(self.rest.head_lr, factor)}
        return self.model_copy(update={"matrix": matrix, "rest": self.rest.model_copy(update=changes)})

    @property
    def head_rate(self) -> tuple[str, float | None]:
        """Key and value of the head's own learning rate."""
        return "rest.head_lr", self.rest.head_lr


class MuonAdamWConfig(_TwoRateConfig):
    """Muon for hidden matrices, AdamW for all other parameters."""

    type: Literal["muon_adamw"] = "muon_adamw"
    """The optimizer."""
    matrix: MuonConfig = MuonConfig()
    """Muon, of hidden matrices."""
    rest: RestConfig = RestConfig()
    """AdamW, of all other parameters."""


class NorMuonAdamWConfig(_TwoRateConfig):
    """NorMuon for hidden matrices, AdamW for all other parameters."""

    type: Literal["normuon_adamw"] = "normuon_adamw"
    """The optimizer."""
    matrix: NorMuonConfig = NorMuonConfig()
    """NorMuon, of hidden matrices."""
    rest: RestConfig = RestConfig()
    """AdamW, of all other parameters."""


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


class LinearConfig(Config):
    """Linear warm-up over a fraction of all steps, then a straight line to `final` times the peak."""

    type: Literal["linear"] = "linear"
    """The schedule of the learning rate."""
    warmup: Fraction = 0.01
    """Fraction of all steps with linear warm-up."""
    final: Fraction = 0.0
    """Learning rate of the last step, as a fraction of the peak."""


class SWAConfig(Config):
    """Mean of the weights at regular steps near the end of the schedule (arXiv 1803.05407)."""

    every: Count = 50
    """Steps from one that is averaged to the next."""
    below: float = Field(0.2, gt=0, le=1)
    """Steps are averaged while the learning rate, after its warm-up, is below this fraction of the peak."""


class QATConfig(Config):
    """Quantisation-aware training in the last steps: passes run with matrices rounded to integers, and updates change
    the weights as they are (docs/quantization.md)."""

    bits: int = Field(ge=2, le=8)
    """Width of the codes of hidden matrices."""
    start: float = Field(0.85, ge=0, lt=1)
    """Fraction of all steps at which it begins."""
    embedding_bits: int | None = Field(None, ge=2, le=8)
    """Width of the codes of embeddings and head; null: they are not rounded."""
    group: Annotated[int | None, Field(gt=0, le=2**20)] = None
    """Columns that share a scale; null: the row."""
    clip: float | None = Field(None, gt=0, le=1e4)
    """Standard deviations of a row or group that the largest code stands for; null: its largest magnitude."""
    embedding_clip: float | None = Field(None, gt=0, le=1e4)
    """The same of embeddings and head."""


class RampConfig(Config):
    """Steps with another batch size or sequence length, before those of the run."""

    until: float = Field(gt=0, lt=1)
    """Fraction of all steps at which they end."""
    batch_size: int | None = Field(None, gt=0, le=2**24)
    """Sequences per optimizer step; null: train.batch_size."""
    seq_len: Length | None = None
    """Tokens per sequence, a divisor of train.seq_len; null: train.seq_len."""


class DistillConfig(Config):
    """Soft targets of a frozen teacher with the tokenizer of the run (docs/distillation.md)."""

    teacher: Annotated[PathText, NEUTRAL]
    """Run folder of the teacher, or folder that Transformers reads, of one of the families of fusedlm import."""
    weight: float = Field(0.5, gt=0, le=1)
    """Weight of the soft loss; that of the targets has the rest."""
    temperature: float = Field(1.0, ge=0.01, le=100)
    """Divides the logits of teacher and model in the soft loss, which is multiplied by its square."""
    format: Literal["int8", "fp8", "int4", "mxfp4"] | None = None
    """Format of the teacher's hidden matrices; null: floats, as they are."""
    sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$", max_length=64), NEUTRAL] = None
    """Checksum of the teacher's weights, before format; null: computed when the run begins, and kept in its recipe."""


OptimizerConfig = Annotated[AdamWConfig | SGDConfig | MuonAdamWConfig | NorMuonAdamWConfig, Field(discriminator="type")]
ScheduleConfig = Annotated[WSDConfig | CosineConfig | LinearConfig, Field(discriminator="type")]


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
    swa: SWAConfig | None = None
    """Mean of the weights at regular steps near the end; null: no mean."""
    qat: QATConfig | None = None
    """Quantisation-aware training in the last steps; null: none."""
    distill: DistillConfig | None = None
    """Distillation from a teacher; null: none."""
    ramps: list[RampConfig] = Field([], max_length=100)
    """Batch sizes and sequence lengths of the first steps, in order."""
    max_bad_steps: Annotated[Count, NEUTRAL] = 8
    """The run stops after this many skipped steps in a row (loss or gradient not finite)."""
    eval_every: Annotated[CountOrZero, NEUTRAL] = 100
    """Steps between validations; 0: only at the end."""
    eval_tokens: Annotated[Tokens | None, NEUTRAL] = None
    """Held-out tokens per validation; null: all."""
    checkpoint_every: Annotated[CountOrZero, NEUTRAL] = 100
    """Steps between checkpoints; 0: only at the end."""
    checkpoint_async: Annotated[bool, NEUTRAL] = True
    """Asynchronous checkpoints: training continues while a copy of the state in host memory is written."""
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
        if self.swa is not None:
            schedule = self.schedule
            lowest = 1.0 if isinstance(schedule, WSDConfig) and schedule.decay == 0 else schedule.final
            if lowest >= self.swa.below:
                raise ValueError(
                    f"swa.below={self.swa.below}: the schedule ends at {lowest}, so that no step would be averaged; "
                    "raise swa.below, or lower schedule.final"
                )
        if self.qat is not None and self.qat_start() >= self.steps:
            raise ValueError(f"qat.start={self.qat.start}: begins after the last of {self.steps} steps; lower it")
        for index, ramp in enumerate(self.ramps):
            _check_ramp(f"ramps.{index}", ramp, self)
        ends = [ramp.until for ramp in self.ramps]
        if sorted(set(ends)) != ends:
            raise ValueError(f"ramps: until={ends} must be increasing")
        return self

    def qat_start(self) -> int:
        """The first step, counted from 0, of quantisation-aware training; one after the last: there is none."""
        return self.steps if self.qat is None else round(self.qat.start * self.steps)

    def step_shape(self, step: int) -> tuple[int, int]:
        """Sequences, and tokens per sequence, of a step counted from 0."""
        for ramp in self.ramps:
            if step < round(ramp.until * self.steps):
                return ramp.batch_size or self.batch_size, ramp.seq_len or self.seq_len
        return self.batch_size, self.seq_len

    def shapes(self) -> list[tuple[int, int]]:
        """The `step_shape` of each ramp that has a step, and of the steps after them."""
        return [self.step_shape(first) for first, _ in self._spans()]

    def total_tokens(self) -> int:
        """Tokens of all steps."""
        return sum((last - first) * math.prod(self.step_shape(first)) for first, last in self._spans())

    def _spans(self) -> list[tuple[int, int]]:
        """First step and end of the steps of one shape."""
        ends = [0, *(round(ramp.until * self.steps) for ramp in self.ramps), self.steps]
        return [(first, last) for first, last in pairwise(ends) if first < last]

    def micro_batch_rows(self, batch_size: int, seq_len: int) -> int:
        """Sequences per forward pass of a step of that shape: the most that divide it and have no more tokens than
        micro_batch_size sequences of seq_len."""
        most = (self.micro_batch_size or self.batch_size) * self.seq_len // seq_len
        return next(rows for rows in range(min(most, batch_size), 0, -1) if batch_size % rows == 0)


def _check_ramp(where: str, ramp: RampConfig, train: TrainConfig) -> None:
    batch_size, seq_len = ramp.batch_size or train.batch_size, ramp.seq_len or train.seq_len
    if train.seq_len % seq_len:
        raise ValueError(f"{where}.seq_len={seq_len}: must divide seq_len={train.seq_len}")
    if batch_size * seq_len % train.seq_len:
        raise ValueError(
            f"{where}: batch_size={batch_size} of seq_len={seq_len} must be whole windows of {train.seq_len} tokens; "
            f"give a batch_size that is a multiple of {train.seq_len // seq_len}"
        )
    if batch_size * seq_len > MAX_STEP_TOKENS:
        raise ValueError(f"{where}: a step has at most {MAX_STEP_TOKENS} tokens, not {batch_size} x {seq_len}")
