"""Time one training step of a recipe by parts, on random tokens.

    python benchmarks/train_step.py recipes/gpt-350m.yaml [key=value ...] [--documents 1024] [--profile] [--json FILE]

Prints the median of forward + backward of a micro-batch and of the optimizer, the model-FLOPs utilisation that they
give for the recipe's batch, peak memory and, with --profile, the kernels that take the most time. Whole runs with
a loader are measured by the metrics of `fusedlm train`; this shows where a step's time goes.
"""

import argparse
import contextlib
import json
import statistics
import time

import torch

from fusedlm import build_model, load_recipe
from fusedlm.model.accounting import count_parameters, training_flops_per_token
from fusedlm.model.precision import autocast, resolve_device, resolve_dtype
from fusedlm.optim import build_optimizer
from fusedlm.train.hardware import peak_flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--documents", type=int, help="mean document length; without it every row is one document")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_intermixed_args()
    result = measure(arguments)
    for key, value in result.items():
        print(f"{key:28} {value:,.4g}" if isinstance(value, float) else f"{key:28} {value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)


def measure(arguments) -> dict:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    train = recipe.train
    device = resolve_device(train.device)
    dtype = resolve_dtype(train.dtype, device)
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(train.seed)
    model = build_model(recipe.model, vocab_size=arguments.vocab_size, device=device, dtype=dtype)
    for name, choice in model.implementations.items():
        print(f"{name}: {choice.name} ({choice.reason})")
    optimizer = build_optimizer(model, train.optimizer, device)
    if train.recompute == "mixer":
        model.recompute_mixers()
    if train.compile:
        model.compile_blocks()
    rows = train.micro_batch_size or train.batch_size
    tokens = torch.randint(arguments.vocab_size, (rows, train.seq_len + 1), device=device)
    documents = None
    if arguments.documents:
        documents = (torch.rand(rows, train.seq_len, device=device) < 1 / arguments.documents).long().cumsum(1)

    weight = torch.full((), 1 / (rows * train.seq_len), device=device)

    def forward_backward():
        with autocast(device, dtype):
            loss = model.weighted_loss(tokens[:, :-1], tokens[:, 1:], weight, documents)
        loss.backward()

    started = time.perf_counter()
    forward_backward()
    optimizer.step()
    _synchronize(device)
    compile_seconds = time.perf_counter() - started
    for _ in range(2):
        forward_backward()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    micro = _median_seconds(forward_backward, device, arguments.repeats)
    update = _median_seconds(optimizer.step, device, arguments.repeats)
    if arguments.profile:
        _profile(forward_backward, device)
    n_micro = train.batch_size // rows
    step = n_micro * micro + update
    tokens_per_second = train.batch_size * train.seq_len / step
    flops = training_flops_per_token(model, train.seq_len)
    peak = peak_flops(device)
    return {
        "recipe": recipe.name,
        "overrides": arguments.overrides,
        "documents": arguments.documents,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": count_parameters(model).total,
        "training_flops_per_token": flops,
        "micro_batch_seconds": micro,
        "optimizer_seconds": update,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops / peak if peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "first_step_seconds": compile_seconds,
    }


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


def _profile(function, device) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        function()
        _synchronize(device)
    rows = {}
    for event in profile.events():
        if (event.device_type.name == "CUDA") == (device.type == "cuda"):
            elapsed = event.device_time_total if device.type == "cuda" else event.self_cpu_time_total
            count, total = rows.get(event.name, (0, 0.0))
            rows[event.name] = (count + 1, total + elapsed)
    total = sum(elapsed for _, elapsed in rows.values())
    print(f"{'share':>6} {'ms':>9} {'calls':>6}  kernel")
    for name, (count, elapsed) in sorted(rows.items(), key=lambda row: -row[1][1])[:24]:
        print(f"{elapsed / total:6.1%} {elapsed / 1e3:9.3f} {count:6}  {name[:110]}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
