"""fusedlm import: a run from a folder that Transformers reads."""

from pathlib import Path
from typing import Annotated

import typer


def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder with config.json, tokenizer.json and safetensors.", show_default=False
        ),
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder to write.", show_default=False)],
) -> None:
    """Make a run folder of a model in the format of Transformers, for eval, generate and the other commands."""
    from fusedlm.export import import_run

    made = import_run(folder, run)
    print(f"{run}: {made.family}, {made.parameters:,} parameters")
