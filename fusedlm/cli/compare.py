"""fusedlm compare: matched variants of a recipe over seeds, with measurements and verdicts."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import integer
from fusedlm.cli.interrupts import exit_code
from fusedlm.cli.packaged import complete_experiment, find_experiment
from fusedlm.terminal import make_console, outlast_output

ExperimentArgument = Annotated[
    Path,
    typer.Argument(
        metavar="EXPERIMENT",
        help="Experiment: a YAML file, or the name of a packaged one (fusedlm recipes).",
        parser=find_experiment,
        autocompletion=complete_experiment,
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of the base recipe (train.steps=100) or of the experiment (experiment.seeds=[0]).",
        show_default=False,
    ),
]


def compare(
    experiment: ExperimentArgument,
    overrides: OverridesArgument = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder (default: runs/NAME of the experiment).", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and the matched sizes; do not train.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Report finished runs; do not train.")] = False,
    gpus: Annotated[
        int,
        typer.Option(parser=integer, metavar="N", help="GPUs of this machine that runs are spread over."),
    ] = 1,
    runs_per_gpu: Annotated[
        int,
        typer.Option(
            "--runs-per-gpu",
            parser=integer,
            metavar="N",
            help="Runs at once on each GPU, for small models; their speeds are not reported.",
        ),
    ] = 1,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Vocabulary size for --dry-run (default: that of the recipe's tokenizer).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run or resume EXPERIMENT, and report its results."""
    from fusedlm.config.experiment import load_experiment

    config, recipes = load_experiment(experiment, overrides or [])
    folder = out or Path("runs") / config.name
    if vocab_size is not None and (vocab_size < 1 or not dry_run):
        raise ValueError(f"--vocab-size {vocab_size}: must be at least 1, and is only for --dry-run")
    if dry_run:
        from fusedlm.compare import plan_experiment

        _print_plan(config, plan_experiment(config, recipes, vocab_size))
        return

    from fusedlm.compare import run_experiment

    with outlast_output():
        outcome = run_experiment(
            config,
            recipes,
            folder,
            console=make_console(),
            train=not report_only,
            gpus=gpus,
            runs_per_gpu=runs_per_gpu,
        )
        if outcome.report is not None:
            _print_results(outcome.results)
            print(outcome.report)
        if outcome.signal is not None:
            counts = (("--gpus", gpus), ("--runs-per-gpu", runs_per_gpu))
            spread = [word for option, count in counts if count > 1 for word in (option, str(count))]
            command = ["fusedlm", "compare", str(experiment), *(overrides or []), "--out", str(folder), *spread]
            again = shlex.join(command)
            print(f"stopped; finished runs are kept; resume with: {again}")
            raise typer.Exit(exit_code(outcome.signal))
        if outcome.report is None:
            print(f"{folder}: no run is finished yet; there is nothing to report")
    if outcome.failed:
        rest = f" (and {len(outcome.failed) - 1} more)" if len(outcome.failed) > 1 else ""
        raise ValueError(
            f"run {outcome.failed[0]}{rest}; the other runs are finished and reported, and the same command tries "
            "failed ones again"
        )


def _print_plan(config, variants: dict) -> None:
    n_seeds, n_trials = len(config.seeds), len(variants) * len(config.tune.lr_factors) if config.tune else 0
    trials = f"{n_trials} trial{'s' * (n_trials > 1)} and " if n_trials else ""
    runs = f"{len(variants) * n_seeds} run{'s' * (len(variants) * n_seeds > 1)}"
    seeds = f"seed{'s' * (n_seeds > 1)} {', '.join(map(str, config.seeds))}"
    by = f" by {config.match_by}" if config.match in ("params", "flops") else ""
    head = ("variant", "parameters", "FLOPs/token", "steps", "tokens", "training FLOPs", "match")
    rows = [
        (
            name,
            f"{variant.account.parameters:,}",
            f"{variant.account.flops_per_token:,.0f}",
            f"{variant.recipe.train.steps:,}",
            f"{variant.tokens:,}",
            f"{variant.account.flops_per_token * variant.tokens:.3g}",
            "–" if variant.deviation is None else f"{100 * variant.deviation:+.2f}%",
        )
        for name, variant in variants.items()
    ]
    _print_table(f"{config.name}: {trials}{runs}, {seeds}, match: {config.match}{by}", head, rows)
    for name, variant in variants.items():
        if variant.changes:
            print(f"{name}, to match: {', '.join(map(str, variant.changes))}")
    if config.tune is not None:
        _print_trials(config, variants)
    if config.match == "time":
        print("steps are timed and set when the experiment runs")


def _print_trials(config, variants: dict) -> None:
    from fusedlm.compare.tuning import rates_text, trial_recipe

    baseline, *_ = variants.values()
    factors = sorted(config.tune.lr_factors)
    rows = []
    for name, variant in variants.items():
        trains = [trial_recipe(config, variant, baseline, factor).train for factor in factors]
        rows.append((name, f"{trains[0].steps:,}", *(rates_text(train.optimizer.rates()) for train in trains)))
    head = ("variant", "steps", *(f"×{factor:g}" for factor in factors))
    _print_table(f"trials of learning rates, seed {config.tune.seed}", head, rows)


def _print_results(results) -> None:
    from fusedlm.compare.tables import summary_table

    _print_table(results.experiment.name, *summary_table(results))
    for sentence in [*results.verdicts(), *results.time_sentences()]:
        print(sentence)


def _print_table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """One table, or on a narrow terminal several of the same rows. In a file, lines have any length."""
    from rich.measure import Measurement

    from fusedlm.compare.tables import split_columns

    console = make_console()
    bounded = console.is_terminal or "COLUMNS" in os.environ
    for n, part in enumerate(split_columns(head, rows, console.width if bounded else None)):
        table = _table("" if n else title, *part)
        if not bounded:
            unbounded = console.options.update(max_width=1000)
            console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
        console.print(table)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]):
    from rich import box
    from rich.table import Table

    from fusedlm.terminal.screen import plain

    table = Table(title=plain(title) if title else None, title_justify="left", box=box.SIMPLE)
    for index, name in enumerate(head):
        # Only words of the head and long names of variants are wrapped.
        least = 0 if index == 0 else max((len(row[index]) for row in rows), default=0)
        align = "left" if index == 0 else "right"
        table.add_column(plain(name), justify=align, min_width=least, overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    return table
