"""Shared by the commands: arguments, loading a run, progress."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedlm.cli.packaged import complete_recipe, find_recipe
from fusedlm.terminal import make_console, printable

RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="Recipe: a YAML file, or the name of a packaged one (fusedlm recipes).",
        parser=find_recipe,
        autocompletion=complete_recipe,
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides of the recipe, such as train.steps=100.", show_default=False),
]
RuntimeArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUNTIME.KEY=VALUE",
        help="Runtime to use instead of the run's, such as runtime.dtype=float32, runtime.backends.attention=sdpa.",
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)]
ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run folder, artifact of fusedlm pack, folder that Transformers reads, or GGUF file.",
        show_default=False,
    ),
]
CheckpointOption = Annotated[str, typer.Option(metavar="last|best|STEP", help="Checkpoint to load.")]
WeightsOption = Annotated[
    str,
    typer.Option(metavar="raw|ema|swa", help="Weights as trained, their moving average, or their mean near the end."),
]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Device.")]
ReportProgress = Callable[[str, int, int | None], None]  # (stage, done, total or None)


def integer(text: str) -> int:
    """Parse an option as an int. Raises typer.BadParameter."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not an integer") from None


def number(text: str) -> float:
    """Parse an option as a float. Raises typer.BadParameter."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


YaRNOption = Annotated[
    float | None,
    typer.Option(
        parser=number,
        metavar="FACTOR",
        help="Extend the context to FACTOR times the training length by YaRN.",
        show_default=False,
    ),
]


def stretch(model, recipe, factor: float | None) -> None:
    """Apply --yarn to a loaded model; None: leave it as it is.

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


@dataclass(frozen=True)
class LoadedRun:
    """A model with all that a command needs beside it; their types are not imported for --help."""

    run: Path  # its folder, or the file or folder that it was read from
    model: Any  # Decoder
    tokenizer: Any  # Tokenizer
    recipe: Any  # Recipe, with the overrides
    device: Any  # torch.device
    dtype: Any  # torch.dtype, of autocast
    step: int  # of the checkpoint
    text: str  # fingerprint of the prepared text that it was trained with


def load_run(
    run: Path,
    *,
    checkpoint: str,
    weights: str,
    device: str,
    overrides: list[str] | None,
    data: Path | None = None,
    files: bool = False,
) -> LoadedRun:
    """A trained model by the options of the command line.

    Args:
        files: whether `run` may be an artifact of fusedlm pack, a folder that Transformers reads, or a GGUF file.
        data: folder of the prepared text, instead of the recipe's data.dir.

    Raises:
        ValueError: as `fusedlm.load`.
    """
    from fusedlm import quant, runs
    from fusedlm.export import load as export
    from fusedlm.model.precision import resolve_device, resolve_dtype

    load_checkpoint = runs.load_checkpoint
    if files:
        load_checkpoint = export.load_checkpoint if export.is_foreign(run) else quant.load_checkpoint
    where, wanted = resolve_device(device), checkpoint_name(checkpoint)
    loaded = load_checkpoint(run, checkpoint=wanted, weights=weights, device=where, overrides=overrides or [])
    recipe = loaded.recipe
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"dir": str(data)})})
    dtype = resolve_dtype(recipe.runtime.dtype, where)
    return LoadedRun(run, loaded.model, loaded.tokenizer, recipe, where, dtype, loaded.step, loaded.text)


def checkpoint_name(text: str) -> str | int:
    """`last`, `best` or a step number.

    Raises:
        ValueError: anything else.
    """
    if text in ("last", "best"):
        return text
    if text.isascii() and text.isdigit():
        return int(text)
    raise ValueError(f"--checkpoint {text!r} is not last, best or a step")


def show(text: str) -> None:
    """Print a piece of generated text. On a terminal, control characters are escaped: a model can sample any."""
    if sys.stdout.isatty():
        text = printable(text)
    print(text, end="", flush=True)


@contextlib.contextmanager
def progress_bars(*, plain: bool = False) -> Iterator[ReportProgress]:
    """Gives a function (stage, done, total) that shows one bar per stage on stderr, if that is a terminal.

    Otherwise it prints one line to stdout per stage if `plain`, and nothing if not.
    """
    from rich.progress import Progress, TimeElapsedColumn

    console = make_console(stderr=True)
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
