"""What several commands share: their arguments and the progress of long work."""

import contextlib
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as train.steps=100.", show_default=False),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
CheckpointOption = Annotated[str, typer.Option(metavar="last|best|STEP", help="Which checkpoint.")]
WeightsOption = Annotated[str, typer.Option(metavar="model|ema", help="Trained weights or their moving average.")]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to run.")]
ReportProgress = Callable[[str, int, int | None], None]


def whole_number(text: str) -> int:
    """An option's value as an int; misuse names the value."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """An option's value as a float; misuse names the value."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


YaRNOption = Annotated[
    float | None,
    typer.Option(
        parser=number,
        metavar="FACTOR",
        help="Stretch rotary embedding to FACTOR times the training length by YaRN.",
        show_default=False,
    ),
]


def stretch(model, recipe, factor: float | None) -> None:
    """What --yarn asks for, done to a loaded model; nothing when it was not given.

    Raises:
        ValueError: the factor is out of range, or the model has no rotary embedding.
    """
    if factor is None:
        return
    from fusedlm.model.yarn import stretch_context

    try:
        stretch_context(model, factor, recipe.train.seq_len)
    except ValueError as error:
        raise ValueError(f"--yarn {factor:g}: {error}") from None


def checkpoint_name(text: str) -> str | int:
    """`last`, `best` or a step number.

    Raises:
        ValueError: anything else.
    """
    if text in ("last", "best"):
        return text
    if text.isascii() and text.isdigit():
        return int(text)
    raise ValueError(f"--checkpoint {text!r} is not last, best or the number of a step")


def show(text: str) -> None:
    """Print a piece of generated text as it comes. A terminal gets no control characters: a model may draw any."""
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    print(text, end="", flush=True)


@contextlib.contextmanager
def progress_bars(*, plain: bool = False) -> Iterator[ReportProgress]:
    """Give a function (stage, done, total) that shows a bar a stage on stderr while that is a terminal.

    Elsewhere it prints a line to stdout when a stage begins if `plain`, and nothing otherwise.
    """
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    console = Console(stderr=True)
    stages = {}
    if not console.is_terminal:

        def report_line(stage: str, done: int, total: int | None) -> None:
            if plain and stage not in stages:
                stages[stage] = None
                print(stage, flush=True)

        yield report_line
        return

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:

        def report_bar(stage: str, done: int, total: int | None) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
            progress.update(stages[stage], completed=done, total=total)

        yield report_bar
