"""Time the parts of one training step of a recipe, on random tokens.

    python benchmarks/train_step.py recipes/gpt-350m.yaml [key=value ...] [--documents 1024] [--profile] [--json FILE]

Prints the median time of forward + backward of a micro-batch (as a CUDA graph if the recipe sets it) and of the
optimizer, the resulting model-FLOPs utilisation at the recipe's batch size, peak memory and, with --profile, the
kernels of a full step with their floors. The metrics of `fusedlm train` measure full runs with a loader; this shows
where the time of a step goes.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import measure_ceilings  # noqa: E402
from benchmarks.kernel_table import kernel_table, summary  # noqa: E402
from fusedlm import build_model, load_recipe  # noqa: E402
from fusedlm.config import Recipe  # noqa: E402
from fusedlm.model.accounting import count_parameters, training_flops_per_token  # noqa: E402
from fusedlm.model.low_precision import cast_weights, precision_table  # noqa: E402
from fusedlm.model.precision import autocast, resolve_device, resolve_dtype  # noqa: E402
from fusedlm.optim import build_optimizer  # noqa: E402
from fusedlm.runs.backends import use_backends  # noqa: E402
from fusedlm.runs.hardware import environment, numerics, peak_flops  # noqa: E402
from fusedlm.runs.precision import use_precision  # noqa: E402
from fusedlm.train.cuda_graph import CapturedBackward  # noqa: E402
from fusedlm.train.micro_batch import forward_backward  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--documents", type=int, help="mean document length; default: every row is one document")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_intermixed_args()
    if arguments.profile and not torch.cuda.is_available():
        parser.error("--profile needs a CUDA device")
    try:
        result = measure(
            load_recipe(arguments.recipe, arguments.overrides),
            vocab_size=arguments.vocab_size,
            mean_document=arguments.documents,
            repeats=arguments.repeats,
            profiled=arguments.profile,
        )
    except ValueError as error:
        parser.error(str(error))
    result |= {"overrides": arguments.overrides}
    result["command"] = shlex.join(["python", "benchmarks/train_step.py", *sys.argv[1:]])
    for key, value in result.items():
        if key not in ("profile", "environment", "command"):
            print(f"{key:28} {value:,.4g}" if isinstance(value, float) else f"{key:28} {value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)


def measure(recipe: Recipe, *, vocab_size: int, mean_document: int | None, repeats: int, profiled: bool) -> dict:
    """The result of one recipe, as `--json` writes it.

    Args:
        mean_document: documents of this mean length; None: every row is one document.
        profiled: whether to profile a step; needs a CUDA device.

    Raises:
        ValueError: the recipe cannot run here, or has `runtime.cuda_graph` with documents or on the CPU.
    """
    device = resolve_device(recipe.runtime.device)
    dtype = resolve_dtype(recipe.runtime.dtype, device)
    if recipe.runtime.cuda_graph and (mean_document or device.type != "cuda"):
        why = "does not go with --documents" if mean_document else f"needs a CUDA device, not {device.type}"
        raise ValueError(f"runtime.cuda_graph=true: {why}; set runtime.cuda_graph=false")
    with numerics(device, dtype, recipe.runtime.deterministic):
        return _measure(recipe, device, dtype, vocab_size, mean_document, repeats, profiled)


def _measure(recipe: Recipe, device, dtype, vocab_size: int, mean_document, repeats: int, profiled: bool) -> dict:
    train, runtime = recipe.train, recipe.runtime
    torch.manual_seed(train.seed)
    model = build_model(recipe.model, vocab_size=vocab_size, device=device, seed=train.seed)
    backends = use_backends(model, runtime, device, dtype, strict=True)
    for name, selection in backends.items():
        print(f"{name}: {selection.backend} ({selection.reason})")
    precision = use_precision(model, recipe, device, dtype)
    for line in precision_table(precision):
        print(line)
    optimizer = build_optimizer(model, train.optimizer, device, dtype)
    model.recompute(runtime.recompute)
    if runtime.compile:
        model.compile_blocks()
    model.train()
    rows = train.micro_batch_size or train.batch_size
    tokens = torch.randint(vocab_size, (rows, train.seq_len + 1), device=device)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    documents = None
    if mean_document:
        documents = (torch.rand(rows, train.seq_len, device=device) < 1 / mean_document).long().cumsum(1)
    loss_weight = torch.full((), train.batch_size * train.seq_len, dtype=torch.float64, device=device).reciprocal()
    batch_weight = rows / train.batch_size
    context = partial(autocast, device, dtype)
    captured = CapturedBackward(model, context, accumulates=rows < train.batch_size) if runtime.cuda_graph else None

    def plain():
        weights = {"loss_weight": loss_weight, "batch_weight": batch_weight}
        return forward_backward(model, tokens, documents, targets, autocast=context, **weights)

    def micro_batch():
        if captured is None or not optimizer.state:  # as in training, captured once the optimizer has its state
            return plain()
        return captured(tokens, targets, loss_weight, batch_weight)

    started = time.perf_counter()
    cast_weights(model)
    micro_batch()
    optimizer.step()
    _synchronize(device)
    compile_seconds = time.perf_counter() - started
    if device.type == "cuda":
        # Before a graph is captured: its replays allocate nothing, though its activations take the same memory.
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        micro_batch()

    def update_weights():
        optimizer.step()
        cast_weights(model)

    micro = _median_seconds(micro_batch, device, repeats)
    update = _median_seconds(update_weights, device, repeats)
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    profile = None
    if profiled:

        def full_step():
            plain()
            update_weights()
            optimizer.zero_grad(set_to_none=True)

        full_step()  # the next one has no gradients to accumulate into, as in training
        profile = summary(kernel_table(full_step, measure_ceilings(device, dtype, quick=False)))
        _print_profile(profile)
    n_micro = train.batch_size // rows
    step = n_micro * micro + update
    tokens_per_second = train.batch_size * train.seq_len / step
    flops = training_flops_per_token(model, train.seq_len)
    peak = peak_flops(device)
    return {
        "recipe": recipe.name,
        "documents": mean_document,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "environment": environment(device, dtype),
        "parameters": count_parameters(model).total,
        "precision": recipe.runtime.precision,
        "low_precision_layers": sum(layer.reason is None for layer in precision),
        "training_flops_per_token": flops,
        "micro_batch_seconds": micro,
        "optimizer_seconds": update,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops / peak if peak else None,
        "peak_memory_gib": None if peak_bytes is None else peak_bytes / 2**30,
        "first_step_seconds": compile_seconds,
        "backends": {name: selection.backend for name, selection in backends.items()},
    } | ({} if profile is None else {"profile": profile})


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _median_seconds(function, device, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _print_profile(profile: dict) -> None:
    near, unknown = profile["share_near_floor"], profile["share_of_unknown_floor"]
    print(
        f"kernels {profile['kernel_ms']:.2f} ms: {near:.1%} of it at 80% of the floor or above, {unknown:.1%} unknown"
    )
    print(f"{'ms':>9} {'calls':>6} {'of floor':>9}  kernel (launched by)")
    for row in profile["heaviest"]:
        share = "" if row["floor_ms"] is None else f"{row['floor_ms'] / row['milliseconds']:.1%}"
        print(f"{row['milliseconds']:9.3f} {row['calls']:6} {share:>9}  {row['kernel'][:90]} ({row['op']})")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
