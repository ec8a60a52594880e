"""A model, or a run folder, from a GGUF file."""

from pathlib import Path

from fusedlm.data.tokenizer import SubwordTokenizer
from fusedlm.export.config_json import ConfigJSON
from fusedlm.export.from_hf import (
    Content,
    Imported,
    content_of,
    family_of,
    model_section,
    placeholder_recipe,
    write_run,
)
from fusedlm.export.gguf.read import GGUFModel


def import_gguf(file: str | Path, run_dir: str | Path) -> Imported:
    """Make a run of a model that llama.cpp reads, at step 0, its weights in float32, whatever type they had.

    Args:
        run_dir: holds no run yet.

    Raises:
        ValueError: the model has another architecture, types or tokenizer than are read here, and which key says so;
            the file is damaged; the package gguf is not installed; or the folder holds a run.
        OSError: a file cannot be read or written.
    """
    return write_run(run_dir, read_gguf(Path(file), Path(run_dir) / "tokenizer.json"))


def read_gguf(file: Path, tokenizer_file: Path) -> Content:
    """The model of a file, without a run.

    Args:
        tokenizer_file: the path that the recipe names.

    Raises:
        ValueError, OSError: as `import_gguf`.
    """
    found = GGUFModel(file)
    config = ConfigJSON(found.config, file)
    family = family_of(config)
    derived = model_section(family, config)
    try:
        tokenizer = SubwordTokenizer(found.tokenizer, found.end_of_text)
    except ValueError as error:
        raise ValueError(f"{file}: tokenizer: {error}") from None
    recipe = placeholder_recipe(file.with_suffix(""), tokenizer_file, family, config, derived, tokenizer)
    return content_of(file, family, recipe, tokenizer, found.tensors())
