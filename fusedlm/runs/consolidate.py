"""Make the checkpoint that several processes wrote the one that one process would have written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.choose import choose, known_identity
from fusedlm.runs.folder import RunFolder, require_run
from fusedlm.runs.shards import file_name, table_of
from fusedlm.runs.state import examine
from fusedlm.runs.tensor_file import write_tensor_file


@dataclass(frozen=True)
class Consolidated:
    """path: of the checkpoint. before, after: number of its files with tensors."""

    path: Path
    before: int
    after: int


def consolidate(run_dir: str | Path, checkpoint: Literal["last", "best"] | int = "last") -> Consolidated:
    """Replace a checkpoint in shards by one with a file of full tensors for each table, `model.safetensors` and so on.
    One tensor is in memory at a time. A checkpoint that has no shards is left as it is.

    Args:
        checkpoint: as `fusedlm.load` takes it.

    Raises:
        ValueError: the folder holds no run or is in use, the checkpoint does not exist or is damaged.
        OSError: the disk is full, or a file cannot be read; the checkpoint is as it was.
    """
    run_dir = Path(run_dir)
    require_run(run_dir)
    with RunFolder(run_dir) as folder:
        checkpoints, identity = folder.checkpoints, known_identity(run_dir)
        run = identity and identity.run
        step = choose(run_dir, checkpoint, run).step
        examine(checkpoints, step, run)  # all files
        found = {name: table_of(name) for name in checkpoints.files(step)}
        stems = sorted({stem for stem in found.values() if stem is not None})
        n_files = sum(stem is not None for stem in found.values())
        if any(found.get(file_name(stem)) is None for stem in stems):
            texts = {name: checkpoints.read_text(step, name) for name, stem in found.items() if stem is None}
            _rewrite(checkpoints, step, stems, texts)
        return Consolidated(checkpoints.path(step), n_files, len(stems))


def _rewrite(checkpoints: Checkpoints, step: int, stems: list[str], texts: dict[str, str]) -> None:
    with checkpoints.reporting_failure(step):
        folder, files = checkpoints.begin(step), {}
        for name, stem in ((file_name(stem), stem) for stem in stems):
            files[name] = write_tensor_file(folder / name, checkpoints.open_tensors(step, stem))
        checkpoints.finish(step, files, texts)
