"""fusedlm checkpoint consolidate: one file per table of a checkpoint that several processes wrote."""

import typer

from fusedlm.cli.common import CheckpointOption, RunArgument, checkpoint_name

checkpoint = typer.Typer(help="Work on the checkpoints of a run.")


@checkpoint.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@checkpoint.command()
def consolidate(run: RunArgument, checkpoint: CheckpointOption = "last") -> None:
    """Replace the shards of a checkpoint, of which each process wrote its own, by the files that one process writes.

    Nothing in fusedlm needs this: all commands read shards. It is for other programs that read safetensors."""
    from fusedlm.runs.consolidate import consolidate

    done = consolidate(run, checkpoint_name(checkpoint))
    if done.before == done.after:
        print(f"{done.path}: has no shards")
    else:
        print(f"{done.path}: {done.before} files with tensors are now {done.after}")
