"""fusedlm plan: the cost of a recipe."""

import json
from typing import Annotated

import typer

from fusedlm.cli.common import OverridesArgument, RecipeArgument, integer, number

H100_BF16_FLOPS = 989e12  # dense bfloat16, NVIDIA's data sheet
_LENGTHS = (1024, 8192, 65536)


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    mfu: Annotated[float, typer.Option(parser=number, metavar="M", help="Model-FLOPs utilisation to assume.")] = 0.45,
    device_flops: Annotated[
        float, typer.Option(parser=number, metavar="F", help="Peak FLOP/s of the device (default: H100, bfloat16).")
    ] = H100_BF16_FLOPS,
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
    """Print parameters, training FLOPs, memory, decoding state and training time of RECIPE, without training."""
    from fusedlm.config import load_recipe

    config = load_recipe(recipe, overrides or [])
    estimate = make_plan(config, mfu=mfu, device_flops=device_flops, vocab_size=vocab_size)
    if as_json:
        print(json.dumps(estimate))
    else:
        print_plan(estimate)


def make_plan(
    recipe, *, mfu: float = 0.45, device_flops: float = H100_BF16_FLOPS, vocab_size: int | None = None
) -> dict:
    """The cost of a recipe in parameters, FLOPs, bytes, tokens and seconds.

    Raises:
        ValueError: a value is out of range, or the recipe's tokenizer file cannot be read.
    """
    import torch

    from fusedlm.data.vocabulary import planned_vocab_size
    from fusedlm.model import build_model
    from fusedlm.model.accounting import count_parameters, state_bytes, training_flops_per_token
    from fusedlm.model.precision import resolve_dtype
    from fusedlm.ops.common import check_backends
    from fusedlm.optim import optimizer_bytes

    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu}: must be greater than 0 and at most 1, such as 0.45")
    if not 0 < device_flops < float("inf"):
        raise ValueError(f"--device-flops {device_flops}: must be a finite number of FLOP/s, greater than 0")
    check_backends(recipe.runtime.backends, "runtime.backends")
    if vocab_size is None:
        vocab_size = planned_vocab_size(recipe.data.tokenizer)
    model = build_model(recipe.model, vocab_size=vocab_size, device="meta")
    parameters = count_parameters(model)
    train = recipe.train
    tokens = train.steps * train.batch_size * train.seq_len
    flops = training_flops_per_token(model, train.seq_len)
    dtype = resolve_dtype(recipe.runtime.dtype, torch.device("cuda"))
    return {
        "name": recipe.name,
        "vocab_size": vocab_size,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "embedding_parameters": parameters.embedding,
        "training_flops_per_token": flops,
        "tokens": tokens,
        "training_flops": flops * tokens,
        "weight_bytes": 4 * parameters.total,
        "gradient_bytes": 4 * parameters.total,
        "optimizer": train.optimizer.type,
        "optimizer_bytes": optimizer_bytes(train.optimizer, parameters.total),
        "average_bytes": 4 * parameters.total if train.ema is not None else 0,
        "state_dtype": str(dtype).removeprefix("torch."),
        "state_bytes": {str(length): state_bytes(model, length, dtype) for length in _LENGTHS},
        "mfu": mfu,
        "device_flops": device_flops,
        "seconds": flops * tokens / (mfu * device_flops),
    }


def print_plan(estimate: dict) -> None:
    """Print the plan as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"plan of {estimate['name']}", title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in _rows(estimate):
        table.add_row(*row)
    Console().print(table)


def _rows(estimate: dict) -> list[tuple[str, str, str]]:
    memory = sum(estimate[f"{part}_bytes"] for part in ("weight", "gradient", "optimizer", "average"))
    states = [
        (f"state at {int(length):,} tokens", _bytes(n), f"one sequence, {estimate['state_dtype']}")
        for length, n in estimate["state_bytes"].items()
    ]
    return [
        ("parameters", f"{estimate['parameters']:,}", f"vocabulary {estimate['vocab_size']:,}"),
        ("  active per token", f"{estimate['active_parameters']:,}", ""),
        ("  embedding", f"{estimate['embedding_parameters']:,}", ""),
        ("training FLOPs per token", f"{estimate['training_flops_per_token']:.4g}", "forward and backward"),
        ("tokens", f"{estimate['tokens']:,}", "steps × batch × length"),
        ("training FLOPs", f"{estimate['training_flops']:.4g}", ""),
        ("weights, gradients, optimizer", _bytes(memory), "float32, without activations"),
        ("  optimizer", _bytes(estimate["optimizer_bytes"]), estimate["optimizer"]),
        *states,
        ("time", _duration(estimate["seconds"]), f"at {estimate['mfu']:.0%} of {estimate['device_flops']:.4g} FLOP/s"),
    ]


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
