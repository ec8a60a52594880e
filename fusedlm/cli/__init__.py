"""The command line: one file per command, which parses, calls the library and prints.

Commands import the library when they run, so that `fusedlm --help` does not import torch.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fusedlm import __version__
from fusedlm.cli.compare import compare
from fusedlm.cli.data import data
from fusedlm.cli.doctor import doctor
from fusedlm.cli.eval import evaluate
from fusedlm.cli.generate import generate
from fusedlm.cli.help import explain
from fusedlm.cli.openmp import bound_spinning
from fusedlm.cli.plan import plan
from fusedlm.cli.recipes import recipes
from fusedlm.cli.report import report
from fusedlm.cli.train import train

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT
PIPE_CLOSED = 1  # as typer exits when it finds the pipe closed

app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(compare)
app.add_typer(data, name="data")
app.add_typer(recipes, name="recipes")
app.command()(report)
app.command()(plan)
app.command()(doctor)
app.command("help")(explain)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fusedlm {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def fusedlm(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train, compare, compress and run small and mid-size hybrid language models."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Bad input (ValueError, OSError, wrong arguments) prints one line on stderr and gives exit code 2. An interrupt and a
    closed pipe print nothing. Any other exception is a defect and keeps its traceback.
    """
    bound_spinning()
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    try:
        code = app(args=arguments, prog_name="fusedlm", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return PIPE_CLOSED
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "fusedlm"
        return _refuse(f"{error.format_message()} (see {command} --help)")
    except (ValueError, OSError) as error:
        return _refuse(_describe(error))


def _refuse(message: str) -> int:
    try:
        sys.stdout.flush()
    except OSError:  # stdout may be a file on the full disk
        _discard_stdout()
    print("error:", " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT


def _describe(error: ValueError | OSError) -> str:
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    return f"{os.fspath(error.filename)}: {error.strerror}" if error.filename else error.strerror


def _discard_stdout() -> None:
    """Discard buffered output: the interpreter would fail on it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
