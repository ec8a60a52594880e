"""fusedlm probe: experiments on a recipe that need no trained model."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import DeviceOption, OverridesArgument, RecipeArgument, integer, number, progress_bars
from fusedlm.cli.probes import table
from fusedlm.strict_json import dumps
from fusedlm.terminal import make_console

probe = typer.Typer(help="Experiments on a recipe that need no trained model.")


@probe.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@probe.command()
def coordinates(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    widths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Values of model.dim, increasing.")
    ] = "128,256,512,1024,2048",
    base_width: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Width at which both parametrisations are the same (default: that of model.mup, or the smallest).",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(parser=integer, metavar="N", help="Optimizer steps.")] = 10,
    rate: Annotated[
        float, typer.Option(parser=number, metavar="X", help="Learning rates as a multiple of the recipe's.")
    ] = 3.0,
    batch_size: Annotated[int, typer.Option(parser=integer, metavar="N", help="Sequences of the batch.")] = 8,
    seq_len: Annotated[int, typer.Option(parser=integer, metavar="N", help="Tokens per sequence.")] = 64,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            parser=integer, metavar="N", help="Vocabulary size (default: that of the recipe).", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(parser=integer, metavar="S", help="Seed of weights and tokens.")] = 0,
    n_seeds: Annotated[
        int, typer.Option("--seeds", parser=integer, metavar="N", help="Seeds, from --seed on, that are averaged.")
    ] = 1,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of coordinates.json and coordinates.png.")] = Path(
        "probes"
    ),
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Check that activations of RECIPE keep their scale as it gets wider, with muP and without.

    Models of several widths take a few steps at a large learning rate on one batch of random tokens.
    """
    from fusedlm.config import load_recipe
    from fusedlm.data.vocabulary import planned_vocab_size
    from fusedlm.files import write_atomic
    from fusedlm.model.precision import resolve_device, resolve_dtype
    from fusedlm.probes import probe_coordinates
    from fusedlm.probes.plots import coordinates_plot
    from fusedlm.runs.backends import use_backends
    from fusedlm.runs.hardware import environment

    loaded = load_recipe(recipe, overrides or [])
    where = resolve_device(device)
    dtype = resolve_dtype(loaded.runtime.dtype, where)
    out.mkdir(parents=True, exist_ok=True)  # before the computation: an unwritable folder fails at once
    with progress_bars() as progress:
        result = probe_coordinates(
            loaded.model,
            loaded.train.optimizer,
            vocab_size=planned_vocab_size(loaded.data.tokenizer) if vocab_size is None else vocab_size,
            widths=_widths(widths),
            base_width=base_width,
            steps=steps,
            rate=rate,
            batch_size=batch_size,
            seq_len=seq_len,
            seed=seed,
            n_seeds=n_seeds,
            setup=partial(use_backends, runtime=loaded.runtime, device=where, dtype=dtype, strict=False),
            device=where,
            dtype=dtype,
            progress=progress,
        )
    record = {"probe": "coordinates", "recipe": loaded.name, **result, "environment": environment(where, dtype)}
    write_atomic(out / "coordinates.json", dumps(record, indent=1) + "\n")
    write_atomic(out / "coordinates.png", coordinates_plot(result))
    if as_json:
        print(dumps(record))
        return
    first, last = result["widths"][0], result["widths"][-1]
    rows = [
        (
            kind,
            *("–" if (value := result["growth"][name][kind]) is None else f"{value:.2f}×" for name in result["growth"]),
        )
        for kind in result["growth"]["mup"]
    ]
    head = ("output", "standard", f"muP, base width {result['base_width']}")
    print(f"Growth of mean |x| from width {first} to {last}, after {steps} steps:")
    make_console().print(table(head, rows))
    print(f"{out / 'coordinates'}.json, {out / 'coordinates'}.png")


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--widths {text!r}: must be a list of integers such as 128,256,512") from None
