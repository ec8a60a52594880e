"""fusedlm data prepare: text to tokenizer and shards."""

import typer

from fusedlm.cli.common import OverridesArgument, RecipeArgument, progress_bars
from fusedlm.terminal import outlast_output

data = typer.Typer(help="Prepare the text of a recipe.")


@data.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@data.command()
def prepare(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Read, split and tokenize the text of RECIPE into shards. Text that is already prepared is only verified.

    With data.pipeline, in many tasks, without duplicates and without what is near held-out text; a preparation that was
    ended continues."""
    from fusedlm.config import load_recipe
    from fusedlm.data import prepare
    from fusedlm.data.preparation import Submitted
    from fusedlm.data.summary import text_facts

    loaded = load_recipe(recipe, overrides or [])
    with outlast_output(), progress_bars(plain=True) as progress:
        try:
            prepared = prepare(loaded.data, progress)
        except Submitted as submitted:
            print(submitted)
            return
    for name, fact in text_facts(prepared, loaded).items():
        print(f"{name}: {fact}")
    print(f"vocabulary: {prepared.tokenizer.vocab_size:,}")
    print(prepared.directory)
