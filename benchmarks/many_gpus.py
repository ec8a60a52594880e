"""Train a recipe on 1, 2, 4 GPUs of this machine: speed, memory, time of the optimizer, and losses beside one GPU's.

    python benchmarks/many_gpus.py [RECIPE] [key=value ...] [--processes 1 2 4] [--replicate] [--experts N]
        [--zero N] [--json FILE]

Speed: every GPU has the recipe's batch, on random tokens; tokens per second and GPU, model-FLOPs utilisation, the
median seconds of a step and of its optimizer, and peak memory beside the figure of `fusedlm plan`. "optimizer,
replicated" is the share that a step's optimizer would have if every GPU orthogonalised all matrices, which takes the
time that it takes on one GPU. Losses: the recipe's batch is divided over the GPUs, so that the losses should be those
of one GPU up to rounding; the largest relative difference over --loss-steps steps is printed.

Without GPUs the processes run on the CPU, which times nothing of use but shows that all of this runs.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.commands import without_json  # noqa: E402
from fusedlm import build_model, load_recipe  # noqa: E402
from fusedlm.cli.plan import make_plan  # noqa: E402
from fusedlm.config import Recipe  # noqa: E402
from fusedlm.data import Batch  # noqa: E402
from fusedlm.distributed import World, processes  # noqa: E402
from fusedlm.model.accounting import training_flops_per_token  # noqa: E402
from fusedlm.model.precision import autocast, resolve_device, resolve_dtype  # noqa: E402
from fusedlm.model.sharding import build_sharded_model  # noqa: E402
from fusedlm.optim import build_optimizer  # noqa: E402
from fusedlm.runs.backends import use_backends  # noqa: E402
from fusedlm.runs.hardware import environment, numerics, peak_flops, peak_memory_bytes  # noqa: E402
from fusedlm.train.parallel import build_mesh  # noqa: E402
from fusedlm.train.step import train_step  # noqa: E402
from scripts.many_gpus_section import compared  # noqa: E402

_WARM_UPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", default=str(REPOSITORY / "recipes/gpt-350m.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4 ... as many as there are GPUs")
    parser.add_argument("--replicate", action="store_true", help="copies instead of shards")
    parser.add_argument("--experts", type=int, default=1, help="processes over which experts are divided, if so many")
    parser.add_argument("--zero", type=int, default=3, choices=(2, 3), help="2: gather weights once a step")
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--loss-steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    n_gpus = torch.cuda.device_count()
    counts = arguments.processes or [n for n in (1, 2, 4, 8) if n <= n_gpus] or [1, 2]
    if arguments.experts < 1:
        parser.error(f"--experts {arguments.experts}: must be at least 1")
    if n_gpus and max(counts) > n_gpus:
        parser.error(f"--processes {max(counts)}: this machine has {n_gpus} GPUs")
    results = []
    try:
        for n in counts:
            results.append(measure(arguments, n))
            if arguments.json:  # after each, for runs that are stopped
                record = record_of(load_recipe(arguments.recipe, arguments.overrides), results)
                arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines(results)))


def record_of(recipe: Recipe, results: list[dict]) -> dict:
    """What is written: one row for each number of processes."""
    device = resolve_device(recipe.runtime.device)
    made = environment(device, resolve_dtype(recipe.runtime.dtype, device))
    command = without_json(shlex.join(["python", "benchmarks/many_gpus.py", *sys.argv[1:]]))
    return {"name": recipe.name, "command": command, "environment": made, "rows": results}


def measure(arguments: argparse.Namespace, n: int) -> dict:
    """The result of n processes, started for this alone."""
    experts = math.gcd(arguments.experts, n)  # of one process 1, as that is what the others are compared with
    others = n // experts
    layout = {"replicate": others, "shard": 1} if arguments.replicate else {"replicate": 1, "shard": others}
    layout["zero"] = arguments.zero
    overrides = [*arguments.overrides, f"runtime.parallel={json.dumps(layout | {'experts': experts})}"]
    overrides.append("runtime.cuda_graph=false")  # of one process alone; without it, all are alike
    load_recipe(arguments.recipe, overrides)  # refused here, not in every process
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (n, vars(arguments), overrides, folder), nprocs=n)
        return json.loads((Path(folder) / "result.json").read_text())


def _process(rank: int, n: int, arguments: dict, overrides: list[str], folder: str) -> None:
    recipe = load_recipe(arguments["recipe"], overrides)
    has_gpus = torch.cuda.is_available() and recipe.runtime.device != "cpu"
    device = torch.device("cuda", rank) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n))
    if n > 1:
        backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=n)
    dtype = resolve_dtype(recipe.runtime.dtype, device)
    with processes(device) as (world, device), numerics(device, dtype, recipe.runtime.deterministic):
        result = _speed(recipe, world, device, dtype, arguments)
        result["losses"] = _losses(recipe, world, device, dtype, arguments)
        if world.is_main:
            (Path(folder) / "result.json").write_text(json.dumps(result))
        world.barrier()
    if n > 1:
        dist.destroy_process_group()


def _built(recipe: Recipe, world: World, device: torch.device, dtype: torch.dtype, vocab_size: int):
    mesh = build_mesh(recipe, world, device.type)
    options = {"vocab_size": vocab_size, "device": device, "seed": recipe.train.seed}
    if mesh is None:
        model = build_model(recipe.model, **options)
    else:
        model = build_sharded_model(recipe.model, **options, mesh=mesh, dtype=dtype, zero=recipe.runtime.parallel.zero)
    use_backends(model, recipe.runtime, device, dtype, strict=True)
    optimizer = build_optimizer(model, recipe.train.optimizer, device, dtype)
    model.recompute(recipe.runtime.recompute)
    if recipe.runtime.compile:
        model.compile_blocks()
    return model.train(), optimizer


def _batch(step: int, rows: int, world: World, seq_len: int, vocab_size: int, device: torch.device) -> Batch:
    """This process's rows of a batch in which each token says much about the next one, so that losses fall."""
    generator = torch.Generator().manual_seed(step)
    strides = torch.randint(0, 8, (rows, seq_len + 1), generator=generator)
    tokens = strides.cumsum(1) * 7919 % vocab_size
    n = rows // world.size
    own = tokens[world.rank * n : (world.rank + 1) * n].to(device)
    return Batch(own[:, :-1].contiguous(), own[:, 1:].contiguous(), None, n * seq_len, 0)


def _speed(recipe: Recipe, world: World, device, dtype, arguments: dict) -> dict:
    """Of the recipe's batch on every device."""
    train, vocab_size = recipe.train, arguments["vocab_size"]
    model, optimizer = _built(recipe, world, device, dtype, vocab_size)
    rows = train.micro_batch_rows(train.batch_size, train.seq_len)
    batch = _batch(0, train.batch_size * world.size, world, train.seq_len, vocab_size, device)
    updates: list[float] = []
    update = optimizer.step

    def timed_update(*options):
        _synchronize(device)
        started = time.perf_counter()
        result = update(*options)
        _synchronize(device)
        updates.append(time.perf_counter() - started)
        return result

    def step():
        train_step(
            model, optimizer, batch, lr_scale=0.0, micro_batch_size=rows, grad_clip=train.grad_clip,
            autocast=partial(autocast, device, dtype), world=world,
        )  # fmt: skip

    for _ in range(_WARM_UPS):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _timed(step, device, world, arguments["steps"])
    peak_memory = world.largest(peak_memory_bytes(device))
    optimizer.step = timed_update  # in steps of their own: waiting around the optimizer takes time
    _timed(step, device, world, arguments["steps"])
    n_tokens = train.batch_size * world.size * train.seq_len
    flops, peak = training_flops_per_token(model, train.seq_len), peak_flops(device)
    # The plan divides the recipe's batch over the processes; here each has all of it.
    changes = {"batch_size": train.batch_size * world.size, "micro_batch_size": rows}
    planned = recipe.model_copy(update={"train": train.model_copy(update=changes)})
    return {
        "processes": world.size,
        "parallel": recipe.runtime.parallel.model_dump(),
        "optimizer": train.optimizer.type,
        "step_seconds": seconds,
        "optimizer_seconds": statistics.median(updates),
        "tokens_per_second_per_gpu": n_tokens / seconds / world.size,
        "mfu": n_tokens / seconds * flops / (peak * world.size) if peak else None,
        "peak_memory_bytes": peak_memory,
        "planned_memory_bytes": make_plan(planned, vocab_size=vocab_size)["memory_bytes"],
    }


def _losses(recipe: Recipe, world: World, device, dtype, arguments: dict) -> list[float]:
    """Of training with the recipe's batch divided over the processes."""
    train, vocab_size = recipe.train, arguments["vocab_size"]
    # Processes draw dropout for rows of their own.
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dropout": 0.0})})
    model, optimizer = _built(recipe, world, device, dtype, vocab_size)
    losses = []
    for index in range(arguments["loss_steps"]):
        batch = _batch(index, train.batch_size, world, train.seq_len, vocab_size, device)
        rows = train.micro_batch_rows(*batch.tokens.shape)
        result = train_step(
            model, optimizer, batch, lr_scale=1.0, micro_batch_size=rows, grad_clip=train.grad_clip,
            autocast=partial(autocast, device, dtype), world=world,
        )  # fmt: skip
        losses.append(result.loss)
    return losses


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(function, device, world: World, repeats: int) -> float:
    """Median seconds, of this process."""
    seconds = []
    for _ in range(repeats):
        world.barrier()
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def lines(results: list[dict]) -> list[str]:
    """A table of results; the first one is that which others are compared with."""
    found = ["GPUs  tokens/s/GPU  scaling    MFU  peak GiB  planned  optimizer  replicated  loss difference"]
    for row in compared(results):
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory, planned = (row[f"{key}_memory_bytes"] / 2**30 for key in ("peak", "planned"))
        found.append(
            f"{row['processes']:>4}  {row['tokens_per_second_per_gpu']:>12,.0f}  {row['scaling']:>7.1%}  {mfu:>5}  "
            f"{memory:>8.2f}  {planned:>7.2f}  {row['optimizer']:>9.1%}  {row['replicated']:>10.1%}  "
            f"{row['loss_difference']:.1e}"
        )
    return found


if __name__ == "__main__":
    main()
