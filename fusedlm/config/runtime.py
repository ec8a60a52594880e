"""The section `runtime` of a recipe: device, precision and backends, which are not part of the model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import NEUTRAL, Config, Count, PositiveFloat, ShortText


class LowPrecisionConfig(Config):
    """How the layers of `runtime.precision` compute, and which layers they are."""

    scales: Literal["row", "tensor"] = "row"
    """One scale per token and output feature, or per tensor; mxfp8 has one per 32 elements instead."""
    gradients: Literal["e4m3", "e5m2"] = "e4m3"
    """Element type of incoming gradients in fp8 and mxfp8."""
    outliers: PositiveFloat | None = None
    """Robust z-score above which columns of a layer's input are multiplied in the precision of the activations, such
    as 3.5; null: none are."""
    outlier_columns: Count | None = None
    """The most columns of a layer that are; null: one of 64, at least 16."""
    layers: Literal["auto", "all"] = "auto"
    """auto: hidden matrices whose predicted speedup is least_speedup or more; all: every one with widths that are
    multiples of 16. The same on a CPU, which emulates."""
    least_speedup: PositiveFloat = 1.05
    """Of a layer's forward and backward pass over bf16, predicted from the rates of the device."""
    exclude: list[ShortText] = Field([], max_length=100)
    """Patterns of names of layers that stay as they are, such as blocks.0.*."""

Processes = Annotated[int, Field(gt=0, le=2**16)]


class ParallelConfig(Config):
    """How the processes that torchrun starts divide a run: replicate x shard x experts of them. The batch is divided
    over all."""

    replicate: Processes = 1
    """Copies of the sharded model."""
    shard: Processes | None = None
    """Processes over which weights, gradients and optimizer state of a copy are sharded; 1: each holds all of them;
    null: all that the others leave. With `experts`, shard x experts processes are the shards of what is no expert."""
    experts: Processes = 1
    """Processes over which the experts of each layer are divided, a divisor of their number; tokens are sent to them.
    1: experts are sharded as other matrices are."""
    zero: Literal[2, 3] = 3
    """Stage of ZeRO (arXiv 1910.02054). 3: the weights of a block are gathered for its forward pass and again for its
    backward pass, in every micro-batch. 2: once a step, and held until its end: less traffic, but memory for all
    weights in the dtype of activations."""


class RuntimeConfig(Config):
    """Device, precision and kernels. Keys that change rounding must stay the same when a run is resumed on the same
    kind of device."""

    device: Annotated[Literal["auto", "cpu", "cuda"], NEUTRAL] = "auto"
    """Where to run; auto: the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of autocast; auto: bfloat16 on GPUs, float32 on CPUs."""
    precision: Literal["none", "fp8", "int8", "mxfp8"] = "none"
    """Element type of the three products of hidden matrices in training; none: that of autocast; mxfp8 is emulated."""
    low_precision: LowPrecisionConfig = LowPrecisionConfig()
    """Scales, outliers and layers of runtime.precision."""
    compile: bool = False
    """torch.compile, one full graph per block; changes rounding."""
    cuda_graph: bool = False
    """One launch per micro-batch, for models whose kernels take less time than their launches."""
    recompute: Annotated[Literal["none", "mixer", "block"], NEUTRAL] = "none"
    """What the backward pass recomputes. mixer: save only its input and the output of attention for backward; block:
    save only the input of each block."""
    deterministic: bool = False
    """Operations whose result can differ between runs are errors."""
    parallel: Annotated[ParallelConfig, NEUTRAL] = ParallelConfig()
    """Division of the run over several processes."""
    backends: dict[ShortText, ShortText] = Field({}, max_length=100)
    """Backend by op, as `fusedlm doctor` lists them; other ops use auto."""

    @model_validator(mode="after")
    def _check(self):
        if self.precision == "none" and self.low_precision != LowPrecisionConfig():
            raise ValueError(
                "runtime.low_precision: has no effect with runtime.precision=none; set runtime.precision, such as fp8"
            )
        if self.precision == "int8" and self.low_precision.gradients == "e5m2":
            raise ValueError(
                "runtime.low_precision.gradients=e5m2: gradients are int8 with runtime.precision=int8; remove it"
            )
        if self.low_precision.outlier_columns is not None and self.low_precision.outliers is None:
            raise ValueError(
                f"runtime.low_precision.outlier_columns={self.low_precision.outlier_columns}: has no effect without "
                "runtime.low_precision.outliers; set it, such as 3.5"
            )
        return self
