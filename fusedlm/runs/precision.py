"""Train the layers that a recipe names in 8 bits."""

from functools import partial

import torch

from fusedlm.config import Recipe
from fusedlm.config.runtime import RuntimeConfig
from fusedlm.distributed import World
from fusedlm.model import Decoder
from fusedlm.model.low_precision import LayerPrecision, choose_layers, lower_precision, unused_patterns
from fusedlm.nn.quantized import hidden_matrices
from fusedlm.ops import LowPrecision
from fusedlm.ops.low_precision.cost import rates_of


def use_precision(
    model: Decoder, recipe: Recipe, device: torch.device, dtype: torch.dtype, world: World | None = None
) -> list[LayerPrecision]:
    """Put 8-bit layers in place, as `runtime.precision` says; before the model is sharded.

    Args:
        device, dtype: where the model will run, and the dtype of its activations.
        world: the processes that share a batch, all of which call this; None: this process alone.

    Returns:
        The decision for every hidden matrix; empty with precision none.

    Raises:
        ValueError: a pattern of `exclude` fits no layer, or a named backend cannot run here.
    """
    runtime, train = recipe.runtime, recipe.train
    if runtime.precision == "none":
        return []
    settings = runtime.low_precision
    precision = LowPrecision(runtime.precision, settings.scales, settings.gradients)
    rows, seq_len = max(train.shapes(), key=lambda shape: shape[0] * shape[1])
    world = world or World()
    rows = -(-rows // world.size)
    micro_batch = train.micro_batch_rows(rows, seq_len)
    if unused := unused_patterns(model, settings.exclude):
        example = next(iter(hidden_matrices(model)), "none")
        raise ValueError(f"runtime.low_precision.exclude={unused[0]}: fits no hidden matrix, such as {example}")
    chosen = choose_layers(
        model,
        precision,
        device=device,
        dtype=dtype,
        n_tokens=micro_batch * seq_len,
        micro_batches=-(-rows // micro_batch),
        compiled=runtime.compile,
        rates=world.on_main(partial(rates_of, device)),  # measured ones differ, and layers may not
        least_speedup=settings.least_speedup if settings.layers == "auto" else None,
        exclude=settings.exclude,
    )
    lower_precision(model, chosen, precision, outliers=settings.outliers, columns=settings.outlier_columns)
    return chosen


def describe_precision(chosen: list[LayerPrecision], runtime: RuntimeConfig, device: torch.device) -> str:
    """Format, scales and number of the layers in 8 bits, in one line."""
    n_low = sum(layer.reason is None for layer in chosen)
    scales = "" if runtime.precision == "mxfp8" else f", one scale per {runtime.low_precision.scales}"
    emulated = ", emulated" if device.type == "cpu" or runtime.precision == "mxfp8" else ""
    return f"{runtime.precision}{scales}{emulated}, in {n_low} of {len(chosen)} hidden matrices"
