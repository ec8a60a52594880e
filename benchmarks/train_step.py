"""Time one training step of a recipe by parts, on random tokens.

    python benchmarks/train_step.py recipes/gpt-350m.yaml [key=value ...] [--documents 1024] [--profile] [--json FILE]

Prints the median of forward + backward of a micro-batch (as a CUDA graph where the recipe says so) and of the
optimizer, the model-FLOPs utilisation that they give for the recipe's batch, peak memory and, with --profile, the
kernels of a whole step beside their floors. Whole runs with a loader are measured by the metrics of `fusedlm train`;
this shows where a step's time goes.
"""

import argparse
import contextlib
import json
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
from fusedlm.model.precision import autocast, resolve_device, resolve_dtype  # noqa: E402
from fusedlm.optim import build_optimizer  # noqa: E402
from fusedlm.train.cuda_graph import CapturedBackward  # noqa: E402
from fusedlm.train.hardware import peak_flops  # noqa: E402


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
    if arguments.profile and not torch.cuda.is_available():
        parser.error("--profile needs a CUDA device")
    result = measure(
        load_recipe(arguments.recipe, arguments.overrides),
        vocab_size=arguments.vocab_size,
        mean_document=arguments.documents,
        repeats=arguments.repeats,
        profiled=arguments.profile,
    ) | {"overrides": arguments.overrides}
    for key, value in result.items():
        if key != "profile":
            print(f"{key:28} {value:,.4g}" if isinstance(value, float) else f"{key:28} {value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)


def measure(recipe: Recipe, *, vocab_size: int, mean_document: int | None, repeats: int, profiled: bool) -> dict:
    train = recipe.train
    device = resolve_device(train.device)
    dtype = resolve_dtype(train.dtype, device)
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(train.seed)
    model = build_model(recipe.model, vocab_size=vocab_size, device=device, dtype=dtype)
    for name, choice in model.implementations.items():
        print(f"{name}: {choice.name} ({choice.reason})")
    optimizer = build_optimizer(model, train.optimizer, device)
    if train.recompute == "mixer":
        model.recompute_mixers()
    if train.compile:
        model.compile_blocks()
    rows = train.micro_batch_size or train.batch_size
    tokens = torch.randint(vocab_size, (rows, train.seq_len + 1), device=device)
    documents = None
    if mean_document:
        documents = (torch.rand(rows, train.seq_len, device=device) < 1 / mean_document).long().cumsum(1)

    context = partial(autocast, device, dtype)
    n_valid = train.batch_size * train.seq_len
    captured = CapturedBackward(model, context, accumulates=rows < train.batch_size) if train.cuda_graph else None

    def plain():
        with context():
            weight = torch.full((), 1 / n_valid, device=device)
            loss = model.weighted_loss(tokens[:, :-1], tokens[:, 1:], weight, documents)
        loss.backward()

    def forward_backward():
        if captured is None or not optimizer.state:  # as in training, captured when the optimizer has its moments
            return plain()
        return captured(tokens[:, :-1], tokens[:, 1:], n_valid)

    started = time.perf_counter()
    forward_backward()
    optimizer.step()
    _synchronize(device)
    compile_seconds = time.perf_counter() - started
    for _ in range(2):
        forward_backward()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    micro = _median_seconds(forward_backward, device, repeats)
    update = _median_seconds(optimizer.step, device, repeats)
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    profile = None
    if profiled:

        def whole_step():
            plain()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        whole_step()  # now without gradients to add to, as in training
        profile = summary(kernel_table(whole_step, measure_ceilings(device, dtype, quick=False)))
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
        "parameters": count_parameters(model).total,
        "training_flops_per_token": flops,
        "micro_batch_seconds": micro,
        "optimizer_seconds": update,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops / peak if peak else None,
        "peak_memory_gib": None if peak_bytes is None else peak_bytes / 2**30,
        "first_step_seconds": compile_seconds,
        "implementations": {name: choice.name for name, choice in model.implementations.items()},
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
