"""fusedlm import: a run from a folder that Transformers reads, or from a file that llama.cpp reads."""

from pathlib import Path
from typing import Annotated

import typer


def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE",
            help="Folder with config.json, tokenizer.json and safetensors, or a GGUF file.",
            show_default=False,
        ),
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder to write.", show_default=False)],
) -> None:
    """Make a run folder of a model in the format of Transformers or llama.cpp, for eval, generate and the other
    commands."""
    if folder.is_file():
        from fusedlm.export.gguf.to_run import import_gguf

        made = import_gguf(folder, run)
    else:
        from fusedlm.export import import_run

        made = import_run(folder, run)
    print(f"{run}: {made.family}, {made.parameters:,} parameters")
