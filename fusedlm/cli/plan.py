"""fusedlm plan: the cost of a recipe."""

import json
import math
from functools import partial
from typing import Annotated, get_args

import typer

from fusedlm.cli.common import OverridesArgument, RecipeArgument, integer, number
from fusedlm.cli.gpus import GPUS, USABLE, find_gpu
from fusedlm.cli.plan_table import print_plan

_LENGTHS = (1024, 8192, 65536)
DEFAULT_GPU = "h100"


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help=f"GPU to train on: {', '.join(GPUS)}.")] = DEFAULT_GPU,
    price: Annotated[
        float | None,
        typer.Option(parser=number, metavar="P", help="Price of that GPU per hour.", show_default=False),
    ] = None,
    mfu: Annotated[float, typer.Option(parser=number, metavar="M", help="Model-FLOPs utilisation to assume.")] = 0.45,
    device_flops: Annotated[
        float | None,
        typer.Option(
            parser=number, metavar="F", help="Peak FLOP/s (default: bfloat16 of the GPU).", show_default=False
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Vocabulary size (default: that of the recipe's tokenizer).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Print parameters, FLOPs, memory, time, cost, decoding state and quantised sizes of RECIPE, without training."""
    from fusedlm.config import load_recipe

    config = load_recipe(recipe, overrides or [])
    estimate = make_plan(config, mfu=mfu, device_flops=device_flops, vocab_size=vocab_size, gpu=gpu, price=price)
    if as_json:
        print(json.dumps(estimate))
    else:
        print_plan(estimate)


def make_plan(
    recipe,
    *,
    mfu: float = 0.45,
    device_flops: float | None = None,
    vocab_size: int | None = None,
    gpu: str = DEFAULT_GPU,
    price: float | None = None,
) -> dict:
    """The cost of a recipe in parameters, FLOPs, bytes, tokens, seconds and money.

    Memory is that of training on a GPU: weights, gradients, optimizer and average in float32, the weights' copies in
    the dtype of activations, and the estimate of `fusedlm.model.memory` for a micro-batch. With the processes that
    `runtime.parallel` names it is that of one of them; on which GPUs training fits (`fits`) is answered for the full
    model, and seconds are those of one GPU.

    Args:
        device_flops: peak FLOP/s; None: that of the GPU.
        vocab_size: None: that of the recipe's tokenizer.
        gpu: a name of `fusedlm.cli.gpus`.
        price: of the GPU per hour; None: cost is null.

    Raises:
        ValueError: a value is out of range, or the recipe's tokenizer file cannot be read and it states no size.
    """
    import torch

    from fusedlm.data.mixture import stage_lines
    from fusedlm.data.vocabulary import lacks_file, planned_vocab_size
    from fusedlm.model import build_model
    from fusedlm.model.accounting import count_parameters, state_bytes, training_flops_per_token
    from fusedlm.model.memory import (
        activation_bytes,
        gathered_bytes,
        held_fraction,
        quantized_bytes,
        weight_copy_bytes,
    )
    from fusedlm.model.precision import resolve_dtype
    from fusedlm.nn.block import Recompute
    from fusedlm.ops.common import check_backends
    from fusedlm.ops.quantized.reference import WEIGHT_FORMATS
    from fusedlm.optim import optimizer_bytes

    card = find_gpu(gpu)
    device_flops = card.bf16_flops if device_flops is None else device_flops
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu}: must be greater than 0 and at most 1, such as 0.45")
    if not 0 < device_flops < math.inf:
        raise ValueError(f"--device-flops {device_flops}: must be a finite number of FLOP/s, greater than 0")
    if price is not None and not 0 <= price < math.inf:
        raise ValueError(f"--price {price}: must be a finite number of at least 0")
    check_backends(recipe.runtime.backends, "runtime.backends")
    source = "option" if vocab_size is not None else "recipe" if lacks_file(recipe.data.tokenizer) else "tokenizer"
    if vocab_size is None:
        vocab_size = planned_vocab_size(recipe.data.tokenizer)
    model = build_model(recipe.model, vocab_size=vocab_size, device="meta")
    parameters = count_parameters(model)
    train = recipe.train
    tokens = train.total_tokens()
    flops = training_flops_per_token(model, train.seq_len)
    dtype = resolve_dtype(recipe.runtime.dtype, torch.device("cuda"))
    fixed = {
        "weight_bytes": 4 * parameters.total,
        "gradient_bytes": 4 * parameters.total,
        "optimizer_bytes": optimizer_bytes(train.optimizer, model),
        "average_bytes": 4 * parameters.total * sum(kept is not None for kept in (train.ema, train.swa)),
        "weight_copy_bytes": weight_copy_bytes(model, dtype),
    }
    recompute = recipe.runtime.recompute

    parallel = recipe.runtime.parallel

    def activations(micro_batch: int, recompute: str = recompute, divided: bool = parallel.experts > 1) -> int:
        return activation_bytes(model, micro_batch * train.seq_len, dtype, recompute, divided)

    shards = (parallel.shard or 1) * parallel.experts
    processes = parallel.replicate * shards
    held = {name: round(held_fraction(model, shards) * n) for name, n in fixed.items()}
    # A copy in one shard keeps its weights in the dtype of activations.
    if shards > 1:
        keeps_experts = shards == parallel.experts
        held["weight_copy_bytes"] = gathered_bytes(model, dtype, parallel.experts, keeps_experts, parallel.zero)
    micro_batch = min(train.micro_batch_size or train.batch_size, max(1, train.batch_size // processes))
    memory = sum(held.values()) + activations(micro_batch)
    fits = {
        name: fit(one.memory_bytes * USABLE, sum(fixed.values()), partial(activations, divided=False), micro_batch)
        for name, one in GPUS.items()
    }
    seconds = flops * tokens / (mfu * device_flops)
    return {
        "name": recipe.name,
        "vocab_size": vocab_size,
        "vocab_source": source,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "embedding_parameters": parameters.embedding,
        "mtp_parameters": parameters.mtp,
        "training_flops_per_token": flops,
        "tokens": tokens,
        "text": planned_text(recipe),
        "stages": stage_lines(recipe),
        "packing": recipe.data.packing,
        "training_flops": flops * tokens,
        **held,
        "processes": processes,
        "shards": shards,
        "optimizer": train.optimizer.type,
        "micro_batch_size": micro_batch,
        "seq_len": train.seq_len,
        "recompute": recipe.runtime.recompute,
        "activation_bytes": activations(micro_batch),
        "activation_bytes_by_recompute": {what: activations(micro_batch, what) for what in get_args(Recompute)},
        "memory_bytes": memory,
        "compile": recipe.runtime.compile,
        "state_dtype": str(dtype).removeprefix("torch."),
        "state_bytes": {str(length): state_bytes(model, length, dtype) for length in _LENGTHS},
        "quantized_bytes": {format: quantized_bytes(model, format) for format in WEIGHT_FORMATS},
        "gpu": gpu.lower(),
        "fits": fits,
        "mfu": mfu,
        "device_flops": device_flops,
        "seconds": seconds,
        "gpu_hours": seconds / 3600,
        "price_per_hour": price,
        "cost": None if price is None else seconds / 3600 * price,
    }


def planned_text(recipe) -> list[dict]:
    """What a run of a recipe reads: of each source `name` (None: the single one), `type`, `path` (None: it has none)
    and `tokens`."""
    from fusedlm.data.mixture import source_schedule, total_samples

    schedule = source_schedule(recipe)
    samples = {None: total_samples(recipe)} if schedule is None else schedule.counts(total_samples(recipe))
    seq_len = recipe.train.seq_len
    return [
        {"name": name, "type": one.type, "path": getattr(one, "path", None), "tokens": samples[name] * seq_len}
        for name, one in recipe.data.named_sources().items()
    ]


def fit(capacity: float, fixed: int, activations, micro_batch: int) -> dict:
    """How training fits into `capacity` bytes per GPU.

    Args:
        fixed: bytes of weights, gradients and optimizer.
        activations: micro-batch size -> bytes.
        micro_batch: of the recipe.

    Returns:
        `gpus`: 1; or, where one sequence per micro-batch does not fit, the GPUs over which weights, gradients and
        optimizer must be sharded; None: activations of one sequence do not fit. `micro_batch_size`: the largest
        divisor of the recipe's that fits.
    """
    for size in range(micro_batch, 0, -1):
        if micro_batch % size == 0 and fixed + activations(size) <= capacity:
            return {"gpus": 1, "micro_batch_size": size}
    room = capacity - activations(1)
    return {"gpus": math.ceil(fixed / room) if room > 0 else None, "micro_batch_size": 1}
