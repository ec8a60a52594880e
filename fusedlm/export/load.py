"""A model of another program as `fusedlm.load` gives that of a run: read where it is, and nothing is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from fusedlm.config.recipe import with_overrides
from fusedlm.export.from_hf import read_folder
from fusedlm.export.gguf.read import MAGIC
from fusedlm.export.gguf.to_run import read_gguf
from fusedlm.export.to_hf import CONFIG
from fusedlm.model.precision import resolve_device
from fusedlm.runs.folder import RECIPE
from fusedlm.runs.load import Loaded, Weights, check_overrides, ready
from fusedlm.runs.state import check_model_tensors, load_model_tensors


def is_foreign(path: Path) -> bool:
    """Whether a path is a folder that Transformers reads and no run, or a GGUF file."""
    if path.is_dir():
        return (path / CONFIG).is_file() and not (path / RECIPE).is_file()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def load_checkpoint(
    path: str | Path,
    *,
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Weights = "raw",
    device: str | torch.device = "auto",
    overrides: Sequence[str] = (),
) -> Loaded:
    """As `fusedlm.runs.load_checkpoint`, of a path which `is_foreign`, at step 0.

    Raises:
        ValueError: as `import_run` and `import_gguf`; another checkpoint or other weights than it has are asked for; or
            an override is not valid.
        OSError: a file cannot be read.
    """
    path = Path(path)
    if checkpoint != "last" or weights != "raw":
        option = f"checkpoint {checkpoint!r}" if checkpoint != "last" else f"weights {weights!r}"
        raise ValueError(f"{path} is no run and has one checkpoint and its weights; leave out {option}")
    target = resolve_device(device)
    found = read_folder(path) if path.is_dir() else read_gguf(path, path.with_name("tokenizer.json"))
    recipe = with_overrides(found.recipe, list(overrides), "runtime")
    check_overrides(overrides)
    check_model_tensors(found.model, found.tensors, str(path))  # before there is memory for it
    load_model_tensors(found.model.to_empty(device=target), found.tensors, str(path))
    return Loaded(ready(found.model, recipe, overrides), found.tokenizer, recipe, 0, found.text)
