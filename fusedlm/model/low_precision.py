"""A model that is trained in 8 bits: which layers, why not the others, and what is done once per optimizer step."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from fusedlm.nn.low_precision import low_precision_layers, replace_layers
from fusedlm.nn.module import Module
from fusedlm.nn.quantized import hidden_matrices
from fusedlm.ops import LowPrecision
from fusedlm.ops.common import OPS, Call
from fusedlm.ops.low_precision.cost import Rates, speedup
from fusedlm.ops.low_precision.formats import unaligned


@dataclass(frozen=True)
class LayerPrecision:
    """What is decided for a hidden matrix.

    reason: why it stays in the precision of the activations; None: it is trained in 8 bits.
    speedup: predicted, of forward and backward; None: not known.
    """

    name: str
    in_features: int
    out_features: int
    reason: str | None
    speedup: float | None


def choose_layers(
    model: Module,
    precision: LowPrecision,
    *,
    device: torch.device,
    dtype: torch.dtype,
    n_tokens: int,
    micro_batches: int = 1,
    compiled: bool = True,
    rates: Rates | None = None,
    least_speedup: float | None = None,
    exclude: list[str] | tuple[str, ...] = (),
) -> list[LayerPrecision]:
    """Decide for every hidden matrix of a model; embeddings, heads, routers and stacks of experts never qualify.

    Args:
        device, dtype: where the model runs, and the dtype of its activations.
        n_tokens: of a micro-batch.
        micro_batches: of an optimizer step.
        compiled: whether blocks are compiled.
        rates: of the device; None: unknown, and no prediction is made.
        least_speedup: layers whose predicted speedup is lower stay as they are; None: all that can, run.
        exclude: patterns of names, such as `blocks.0.*`, of layers that stay as they are.

    Raises:
        ValueError: the model names a backend that cannot run here.
    """
    layers = hidden_matrices(model)
    call, chosen = Call(device, dtype), []
    for name, layer in layers.items():
        k, m = layer.in_features, layer.out_features
        factor = None
        if rates is not None:
            options = {"micro_batches": micro_batches, "compiled": compiled}
            factor = speedup(rates, n_tokens, k, m, precision, **options)
        reason = unaligned(k, m)
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            reason = "excluded"
        elif reason is None:
            reason = _cannot_run(model, call, precision, k, m)
        if reason is None and least_speedup is not None and factor is not None and factor < least_speedup:
            reason = f"would be slower than {least_speedup:g} times bf16"
        chosen.append(LayerPrecision(name, k, m, reason, factor))
    return chosen


def unused_patterns(model: Module, patterns: list[str]) -> list[str]:
    """The patterns that fit no hidden matrix of a model."""
    names = hidden_matrices(model)
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def _cannot_run(model: Module, call: Call, precision: LowPrecision, k: int, m: int) -> str | None:
    if precision.format == "mxfp8" or call.device.type != "cuda":
        return None  # emulated
    sizes = {"in_features": k, "out_features": m, "is_integer": int(precision.grid.is_integer)}
    selection = OPS["low_precision_linear"].select(model.backend("low_precision_linear"), call, **sizes)
    # The emulation is for other devices, and slow: on a GPU it must be requested.
    return selection.unsupported.get("triton") if selection.reason != "requested" else None


def lower_precision(model: Module, chosen: list[LayerPrecision], precision: LowPrecision, **options) -> None:
    """Train the layers that were chosen in 8 bits from now on; options: as `LowPrecisionLinear` takes them."""
    names = [layer.name for layer in chosen if layer.reason is None]
    if names:
        replace_layers(model, names, precision, **options)


def cast_weights(model: torch.nn.Module) -> None:
    """Cast the weight of every layer with 8-bit products. A loop that calls it must do so after each update of the
    weights: forward passes then leave it to the loop."""
    for layer in low_precision_layers(model).values():
        layer.cast_weight()
        layer.cast_by_loop = True


def outlier_figures(model: torch.nn.Module) -> dict[str, float | list[float]]:
    """The outlier columns since the last call, as figures of metrics.jsonl; empty where none are isolated. Waits for
    the device.

    Returns:
        outlier_share: fraction of input columns isolated, mean over the layers.
        outlier_missed: fraction of columns above the threshold that had no place, mean over the layers.
        outlier_layers: the fraction isolated in each layer, first to last.
    """
    layers = [layer for layer in low_precision_layers(model).values() if layer.outlier_counts is not None]
    if not layers:
        return {}
    rows = torch.stack([layer.outlier_counts for layer in layers]).tolist()
    for layer in layers:
        layer.outlier_counts.zero_()
    per_call = [
        (isolated / max(calls, 1) / layer.in_features, (found - isolated) / max(calls, 1) / layer.in_features)
        for layer, (calls, found, isolated) in zip(layers, rows, strict=True)
    ]
    shares, missed = zip(*per_call, strict=True)
    mean = [sum(column) / len(layers) for column in (shares, missed)]
    return {"outlier_share": mean[0], "outlier_missed": mean[1], "outlier_layers": list(shares)}


def precision_table(chosen: list[LayerPrecision]) -> list[str]:
    """A line for each kind of layer: the same name but for the block, sizes and decision."""
    kinds: dict[tuple, list[LayerPrecision]] = {}
    for layer in chosen:
        name = re.sub(r"\b\d+\b", "*", layer.name)
        kinds.setdefault((name, layer.in_features, layer.out_features, layer.reason), []).append(layer)
    rows = []
    for (name, k, m, reason), layers in kinds.items():
        factor = layers[0].speedup
        predicted = "" if factor is None else f"{factor:.2f}x"
        decision = "8 bits" if reason is None else f"no: {reason}"
        rows.append((name, f"{k} -> {m}", f"x{len(layers)}", predicted, decision))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
