"""The section `runtime` of a recipe: device, precision and backends, which are not part of the model."""

from typing import Annotated, Literal

from pydantic import Field

from fusedlm.config.schema import NEUTRAL, Config, ShortText

Processes = Annotated[int, Field(gt=0, le=2**16)]


class ParallelConfig(Config):
    """How the processes that torchrun starts divide a run: replicate x shard of them. The batch is divided over all."""

    replicate: Processes = 1
    """Copies of the sharded model."""
    shard: Processes | None = None
    """Processes over which weights, gradients and optimizer state of a copy are sharded; 1: each holds all of them;
    null: all that `replicate` leaves."""
    experts: int = Field(1, ge=1, le=1)
    """Processes over which experts are divided; 1 is all there is yet: they are sharded as other matrices are."""


class RuntimeConfig(Config):
    """Device, precision and kernels. Keys that change rounding must stay the same when a run is resumed on the same
    kind of device."""

    device: Annotated[Literal["auto", "cpu", "cuda"], NEUTRAL] = "auto"
    """Where to run; auto: the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of autocast; auto: bfloat16 on GPUs, float32 on CPUs."""
    compile: bool = False
    """torch.compile, one full graph per block; changes rounding."""
    cuda_graph: bool = False
    """One launch per micro-batch, for models whose kernels take less time than their launches."""
    recompute: Annotated[Literal["none", "mixer"], NEUTRAL] = "none"
    """What the backward pass recomputes; mixer: save only its input and the output of attention for backward."""
    deterministic: bool = False
    """Operations whose result can differ between runs are errors."""
    parallel: Annotated[ParallelConfig, NEUTRAL] = ParallelConfig()
    """Division of the run over several processes."""
    backends: dict[ShortText, ShortText] = Field({}, max_length=100)
    """Backend by op, as `fusedlm doctor` lists them; other ops use auto."""
