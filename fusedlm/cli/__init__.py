"""The command line: one file per command, which parses, calls the library and prints.

Commands import the library when they run, so that `fusedlm --help` does not import torch.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fusedlm import __version__
from fusedlm.cli.checkpoint import checkpoint
from fusedlm.cli.compare import compare
from fusedlm.cli.data import data
from fusedlm.cli.doctor import doctor
from fusedlm.cli.eval import evaluate
from fusedlm.cli.export import export
from fusedlm.cli.generate import generate
from fusedlm.cli.golf import golf
from fusedlm.cli.help import explain
from fusedlm.cli.import_ import import_
from fusedlm.cli.interrupts import Terminated, die_of_interrupt, exit_code, raising_signals
from fusedlm.cli.openmp import bound_spinning
from fusedlm.cli.pack import pack
from fusedlm.cli.plan import plan
from fusedlm.cli.probe import probe
from fusedlm.cli.processes import is_first_here
from fusedlm.cli.quantize import quantize
from fusedlm.cli.recipes import recipes
from fusedlm.cli.report import report
from fusedlm.cli.serve import serve
from fusedlm.cli.train import train
from fusedlm.terminal import one_line, standard_streams

BAD_INPUT = 2
INTERRUPTED = exit_code(signal.SIGINT)
PIPE_CLOSED = 1  # as typer exits when it finds the pipe closed

app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(serve)
app.command()(quantize)
app.command()(pack)
app.command()(golf)
app.command()(compare)
app.add_typer(data, name="data")
app.add_typer(recipes, name="recipes")
app.add_typer(probe, name="probe")
app.add_typer(checkpoint, name="checkpoint")
app.command()(report)
app.command()(export)
app.command("import")(import_)
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

    Bad input (ValueError, OSError, wrong arguments) prints one line on stderr and gives exit code 2. A signal gives 128
    plus its number, and like a closed pipe prints nothing. Any other exception is a defect and keeps its traceback.

    Args:
        arguments: None: those of this process, which a Ctrl-C in a terminal then ends by SIGINT.
    """
    bound_spinning()
    with standard_streams():
        _log_to_stderr()
        with raising_signals():
            code = _run(arguments)
        if code == INTERRUPTED and arguments is None:
            die_of_interrupt()
        return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=arguments, prog_name="fusedlm", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated as signalled:
        return exit_code(signalled.number)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "fusedlm"
        return _refuse(f"{error.format_message()} (see {command} --help)")
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and error is sys.stdout.failure:
            return PIPE_CLOSED
        return _refuse(_describe(error), told_by_others=not is_first_here() and not _is_of_one_process(error))


def _is_of_one_process(error: ValueError | OSError) -> bool:
    from fusedlm.distributed import OneProcessFailed

    return isinstance(error, OneProcessFailed)


def _refuse(message: str, *, told_by_others: bool = False) -> int:
    """told_by_others: another of the processes that torchrun started prints the same."""
    if told_by_others:
        return BAD_INPUT
    with contextlib.suppress(OSError):  # stdout may be a file on the full disk
        sys.stdout.flush()
    print("error:", one_line(message), file=sys.stderr)
    return BAD_INPUT


def _describe(error: ValueError | OSError) -> str:
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    named = error.filename and isinstance(error.filename, str | bytes | os.PathLike)  # it may be a descriptor
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if named else error.strerror


class _Warning(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"warning: {one_line(record.getMessage())}"


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def _log_to_stderr() -> None:
    handler = _Stderr()
    handler.setFormatter(_Warning())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
