"""fusedlm golf: the best model in so many bytes, from a recipe to a scored file."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import OverridesArgument, RecipeArgument, WeightsOption, integer, progress_bars
from fusedlm.cli.golf_run import MODEL, RECORD, REPORT, RUN, Options, golfed, report_lines
from fusedlm.cli.interrupts import exit_code
from fusedlm.cli.pack import described
from fusedlm.strict_json import dumps
from fusedlm.terminal import make_console, outlast_output


def golf(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of all results (default: runs/NAME-golf).", show_default=False)
    ] = None,
    n_bytes: Annotated[
        int, typer.Option("--bytes", parser=integer, metavar="N", help="Most bytes of the file; 16 MB are 16000000.")
    ] = 16_000_000,
    tokens: Annotated[
        int, typer.Option(parser=integer, metavar="N", help="Tokens of training text to calibrate with.")
    ] = 131_072,
    stride: Annotated[
        int, typer.Option(parser=integer, metavar="N", help="Tokens from one sliding window to the next.")
    ] = 64,
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            "--eval-tokens",
            parser=integer,
            metavar="N",
            help="Held-out tokens to score (default: all).",
            show_default=False,
        ),
    ] = None,
    with_code: Annotated[bool, typer.Option("--with-code", help="Count the code of a reader in --bytes too.")] = False,
    weights: WeightsOption = "raw",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Train RECIPE, quantise it for a file of so many bytes, and score the file. An interrupted command resumes the
    training when it is repeated; a finished run is quantised again."""
    from fusedlm.config import load_recipe
    from fusedlm.files import write_atomic
    from fusedlm.quant.artifact.budget import OverBudget
    from fusedlm.report import write_report
    from fusedlm.train import train
    from fusedlm.train.display import Display

    config = load_recipe(recipe, overrides or [])
    options = Options(n_bytes, tokens, stride, eval_tokens, weights, with_code)
    if weights in ("ema", "swa") and getattr(config.train, weights) is None:
        raise ValueError(f"--weights {weights}: the recipe keeps none; set train.{weights}")
    folder = out or Path("runs") / f"{config.name}-golf"
    with outlast_output():
        result = train(config, folder / RUN, resume=True, display=Display(make_console(stderr=as_json)))
        if result.signal is not None:
            again = shlex.join(["fusedlm", "golf", str(recipe), *(overrides or []), "--out", str(folder)])
            print(f"stopped at step {result.step}; resume with the same options: {again}")
            raise typer.Exit(exit_code(result.signal))
    try:
        with progress_bars() as progress:
            record = golfed(folder, options, progress)
    except OverBudget as error:
        print(described(error.breakdown.record() | {"budget": n_bytes}))
        raise
    lines = report_lines(record)
    table = described(record | {"budget": n_bytes})
    write_atomic(folder / REPORT, "\n".join([f"# {config.name}", "", *lines, "", "```text", table, "```"]) + "\n")
    page = write_report(folder / RUN)
    if as_json:
        print(dumps(record))
        return
    print("\n".join(lines))
    print(f"by tensor: {folder / REPORT}; record: {folder / RECORD}; training: {page}")
    print(f"next: fusedlm generate {shlex.quote(str(folder / MODEL))} --prompt TEXT")
