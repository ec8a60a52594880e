"""fusedlm recipes: list the packaged recipes and experiments, and copy one."""

import re
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.packaged import EXPERIMENTS, packaged_names, packaged_path
from fusedlm.files import write_atomic
from fusedlm.terminal import make_console

recipes = typer.Typer(help="List the packaged recipes and experiments; copy one.")


@recipes.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the packaged recipes and experiments."""
    if context.invoked_subcommand is not None:
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fusedlm.report.units import count

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("needs", overflow="fold")
    for name in packaged_names("recipe"):
        recipe, parameters = _read(name)
        table.add_row(name, count(parameters), Text(", ".join(needs(recipe)) or "nothing to download"))
    make_console().print(table)
    print(f"experiments: {', '.join(packaged_names('experiment'))}")
    print("train one: fusedlm train demo; compare: fusedlm compare ultra-cpu; copy one: fusedlm recipes copy demo")


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Recipe, or experiments/NAME.", show_default=False)],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="File to write (default: NAME.yaml here).", show_default=False)
    ] = None,
) -> None:
    """Copy a packaged recipe, or an experiment and its base recipe, to change it."""
    folder, _, stem = name.rpartition("/")
    if folder not in ("", EXPERIMENTS):
        raise ValueError(f"{name}: a packaged recipe is NAME, an experiment {EXPERIMENTS}/NAME")
    source = packaged_path(stem, "experiment" if folder else "recipe")
    text = source.read_text(encoding="utf-8")
    target = file or Path(source.name)
    if target.is_dir():
        target = target / source.name
    wanted = {target: text}
    if folder:
        # An experiment names its base relative to itself.
        base = source.parent / re.search(r"^base: (.+)$", text, re.MULTILINE)[1]
        beside = f"{base.stem}-base.yaml" if base.name == target.name else base.name
        wanted = {
            target: re.sub(r"^base: .+$", f"base: {beside}", text, flags=re.MULTILINE),
            target.parent / beside: base.read_text(encoding="utf-8"),
        }
    for path in wanted:
        if path.exists():
            raise ValueError(f"{path}: exists already; name another file")
    for path, content in wanted.items():
        write_atomic(path, content)
        print(path)


def needs(recipe) -> list[str]:
    """Files that a recipe reads, and the device that it is made for."""
    sources = [*recipe.data.named_sources().values(), recipe.data.validation, recipe.data.tokenizer]
    files = [source.path for source in sources if getattr(source, "path", None) is not None]
    return files + ["a GPU"] * (recipe.runtime.compile and recipe.runtime.device != "cpu")


def _read(name: str):
    from fusedlm.config import load_recipe
    from fusedlm.data.vocabulary import planned_vocab_size
    from fusedlm.model import build_model
    from fusedlm.model.accounting import count_parameters

    recipe = load_recipe(packaged_path(name, "recipe"))
    model = build_model(recipe.model, vocab_size=planned_vocab_size(recipe.data.tokenizer), device="meta")
    return recipe, count_parameters(model).total
