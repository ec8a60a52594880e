"""Steps with 8-bit products, of one process and of several."""

import contextlib

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from fusedlm.config.train import AdamWConfig
from fusedlm.distributed import World
from fusedlm.model import build_model
from fusedlm.nn import low_precision as low_precision_layer
from fusedlm.nn.low_precision import low_precision_layers, replace_layers
from fusedlm.nn.quantized import hidden_matrices
from fusedlm.ops import LowPrecision
from fusedlm.ops.low_precision.cost import Rates
from fusedlm.ops.low_precision.formats import unaligned
from fusedlm.optim import build_optimizer
from fusedlm.runs import precision
from fusedlm.train.step import train_step
from tests.distributed.models import ALIGNED, CPU, VOCAB, built
from tests.distributed.steps import batch_at, exact_losses

FP8 = ("runtime.precision=fp8", "runtime.low_precision.outliers=3.5", "train.eval_every=0")
LOW_LAYOUTS = [(1, 2), (2, 1), (1, 3)]  # whose micro-batches are of the same sequences
# (format, outliers, ZeRO stage, recompute), trained with 8-bit products.
LOW = [
    (LowPrecision(), None, 3, "none"),
    (LowPrecision("fp8", "tensor", "e5m2"), None, 2, "block"),
    (LowPrecision("int8"), 3.0, 3, "mixer"),
    (LowPrecision(gradients="e5m2"), 3.0, 2, "none"),
]


def low_precision(layout: tuple[int, ...] | None, world: World) -> list[dict]:
    """Losses of three steps of the cases of LOW, in float64, how often a weight was cast in each of them, the number of
    layers; and of the first case losses and casts with compiled blocks."""
    cast, found = low_precision_layer.low_precision_weight, []
    for format, outliers, zero, recompute in LOW:
        n_casts, runs = [], []

        def prepare(model, format=format, outliers=outliers):
            layers = hidden_matrices(model).items()
            names = [name for name, layer in layers if unaligned(layer.in_features, layer.out_features) is None]
            replace_layers(model, names, format, outliers=outliers, columns=2 if outliers else None)

        def counting(*arguments, n_casts=n_casts, **options):
            n_casts.append(1)
            return cast(*arguments, **options)

        for compiles in (False, True) if format is LOW[0][0] else (False,):
            model = built(ALIGNED, layout, torch.float64, zero, prepare).train()
            model.recompute(recompute)
            if compiles:
                model.compile_blocks(backend=aot_eager)
            optimizer, losses, counts = build_optimizer(model, AdamWConfig(lr=0.01), CPU), [], []
            options = {"lr_scale": 1.0, "micro_batch_size": 2, "grad_clip": None, "autocast": contextlib.nullcontext}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(low_precision_layer, "low_precision_weight", counting)
                for step in range(3):
                    n_casts.clear()
                    with exact_losses(world) as exact:
                        train_step(model, optimizer, batch_at(step, world), **options, world=world)
                    losses.append(exact[0])
                    counts.append(len(n_casts))
            runs.append((losses, counts))
        n_layers = len(low_precision_layers(model))
        found.append({"losses": runs[0][0], "casts": runs[0][1], "layers": n_layers, "compiled": runs[-1]})
    return found


def chosen(recipe, world: World) -> list[str]:
    """The layers that are trained in 8 bits where every process measures other rates: the main one fast products."""
    model = build_model(recipe.model, vocab_size=VOCAB, device="meta")
    rates = Rates(3e12, ((2048.0, {"bf16": 6.5e14, "fp8 row": 6.5e14 if world.rank else 1e18}),), "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "rates_of", lambda device: rates)
        found = precision.use_precision(model, recipe, CPU, torch.float32, world)
    return [layer.name for layer in found if layer.reason is None]
