"""fusedlm train: from a recipe to a trained model."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import OverridesArgument, RecipeArgument, show
from fusedlm.cli.interrupts import exit_code
from fusedlm.cli.processes import is_main
from fusedlm.terminal import make_console, outlast_output

_SAMPLE_TOKENS = 200
_SAMPLE_TEMPERATURE = 0.8  # at 1, small models sample too many unlikely tokens


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (default: runs/NAME of the recipe).", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and its plan; do not train.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the backend of each op, and the reason.")] = False,
) -> None:
    """Train RECIPE, preparing its text first if necessary.

    On several processes: torchrun --nproc-per-node N -m fusedlm train RECIPE.
    """
    from fusedlm.config import dump_recipe, load_recipe

    config = load_recipe(recipe, overrides or [])
    run = out or Path("runs") / config.name
    if dry_run:
        if not is_main():
            return
        from fusedlm.cli.plan import make_plan
        from fusedlm.cli.plan_table import print_plan

        estimate = make_plan(config)
        print(dump_recipe(config))
        print_plan(estimate)
        return

    from fusedlm.train import train
    from fusedlm.train.display import Display

    with outlast_output():
        result = train(config, run, resume=resume, display=Display(make_console(), verbose=verbose))
        if not is_main():
            raise typer.Exit(exit_code(result.signal) if result.signal is not None else 0)
        if result.signal is not None:
            again = shlex.join(["fusedlm", "train", str(recipe), *(overrides or []), "--out", str(run), "--resume"])
            print(f"stopped at step {result.step}; resume with: {again}")
            raise typer.Exit(exit_code(result.signal))
        if result.val_bpb is not None:
            spans = f"(window {config.train.seq_len}, stride {config.train.seq_len})"
            print(f"validation: {result.val_bpb:.4f} bits per byte {spans}, step {result.step}")
        _print_sample(run, config.runtime.device)
        for command in ("eval", "generate --prompt TEXT", "report"):
            name, *options = command.split(maxsplit=1)
            print("next:", " ".join(["fusedlm", name, shlex.quote(str(run)), *options]))


def _print_sample(run: Path, device: str) -> None:
    """Continue the recipe's prompt on stdout, and write the text to sample.txt for the report."""
    from fusedlm.files import write_atomic
    from fusedlm.generation import generate
    from fusedlm.model.precision import resolve_device, resolve_dtype
    from fusedlm.runs import load

    model, tokenizer, recipe = load(run, device=device)
    where = resolve_device(device)
    sample = recipe.sample_prompt
    show(f"\n{sample}")
    for piece in generate(
        model,
        tokenizer,
        recipe.sample_prompt,
        max_tokens=_SAMPLE_TOKENS,
        temperature=_SAMPLE_TEMPERATURE,
        stream=True,
        device=where,
        dtype=resolve_dtype(recipe.runtime.dtype, where),
    ):
        sample += piece
        show(piece)
    print("\n")
    write_atomic(run / "sample.txt", sample + "\n")
