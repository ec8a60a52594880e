"""Changes to the files of a run whose checksums are made right, as if the run had written them."""

import json
from collections.abc import Callable
from pathlib import Path

from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.identity import IDENTITY, identity_of, read_identity, write_identity


def edit_checkpoint(run: Path, step: int, name: str, edit: Callable[[str], str]) -> None:
    """Change a text of a checkpoint, and its manifest."""
    checkpoints = Checkpoints(run / "checkpoints")
    folder = checkpoints.path(step)
    names = checkpoints.files(step)
    (folder / name).write_text(edit((folder / name).read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "manifest.json").unlink()
    assert {entry.name for entry in folder.iterdir()} == set(names)
    checkpoints._seal(folder, {})


def edit_state(run_dir: Path, at: int, **changes) -> None:
    """Change fields of state.json in the checkpoint of step `at`; a value `...` removes the field."""

    def edit(text: str) -> str:
        state = json.loads(text) | changes
        return json.dumps({key: value for key, value in state.items() if value is not ...}, indent=2) + "\n"

    edit_checkpoint(run_dir, at, "state.json", edit)


def edit_header(run: Path, name: str, edit: Callable[[str], str]) -> None:
    """Change a file beside the checkpoints, and run.json."""
    (run / name).write_text(edit((run / name).read_text(encoding="utf-8")), encoding="utf-8")
    identity = read_identity(run)
    write_identity(run, identity_of(identity.run, {name: (run / name).read_bytes() for name in identity.files}))


def edit_recipe(run: Path, edit: Callable[[str], str]) -> None:
    """Change the recipe everywhere."""
    edit_header(run, "recipe.yaml", edit)
    for step in Checkpoints(run / "checkpoints").steps():
        edit_checkpoint(run, step, "recipe.yaml", edit)


def as_written_before_checksums(run: Path) -> Path:
    """Make a run what the version without run.json, checks of metrics and ids in checkpoints wrote."""
    (run / IDENTITY).unlink()
    for step in Checkpoints(run / "checkpoints").steps():
        edit_state(run, step, run=..., tokenizer=..., metrics=...)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        del record["check"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    return run
