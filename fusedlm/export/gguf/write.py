"""A run as one GGUF file."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fusedlm.config import Recipe
from fusedlm.export.families import FAMILIES, fits
from fusedlm.export.families.base import Family
from fusedlm.export.gguf.architectures import ARCHITECTURES, gguf_tensors, obstacles
from fusedlm.export.gguf.quantize import TYPES, encoded, type_of
from fusedlm.export.gguf.vocabulary import vocabulary
from fusedlm.export.to_hf import exported_tensors, max_length
from fusedlm.files import sync
from fusedlm.model import Decoder
from fusedlm.nn.quantized import decode_layers, quantized_weights
from fusedlm.runs.load import Weights, load_checkpoint


@dataclass(frozen=True)
class ExportedGGUF:
    """What was written. tensors: the number of each type by its name. step: of the weights."""

    file: Path
    architecture: str
    parameters: int
    tensors: dict[str, int]
    step: int


def export_gguf(
    run_dir: str | Path,
    file: str | Path,
    *,
    family: str | None = None,
    dtype: str = "float32",
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Weights = "raw",
) -> ExportedGGUF:
    """Write model and tokenizer of a run for llama.cpp.

    Args:
        file: is not there; it is complete or absent.
        family: as `export_run` takes it; of one that llama.cpp runs.
        dtype: float32, float16, bfloat16, q8_0 or mxfp4 (`type_of` says which tensors). A run quantised to mxfp4 is
            written as mxfp4, without another rounding.

    Raises:
        ValueError: llama.cpp runs no such model or tokenizer, and which keys stand in the way; the package gguf is not
            installed; or as `export_run`.
        OSError: a file cannot be read or written.
    """
    run_dir, file = Path(run_dir), Path(file)
    if dtype not in TYPES:
        raise ValueError(f"--dtype {dtype}: must be one of {', '.join(TYPES)}")
    if file.exists():
        raise ValueError(f"{file}: exists already; name a file that does not")
    require_gguf("--to gguf")
    loaded = load_checkpoint(run_dir, checkpoint=checkpoint, weights=weights, device="cpu")
    model = loaded.model
    _decode(model, dtype, run_dir)
    chosen = _choose(loaded.recipe, family)
    keys, tensors = gguf_model(chosen, model, loaded.recipe)
    tokens = vocabulary(loaded.tokenizer, model.vocab_size)
    kinds = {name: type_of(name, tuple(tensor.shape), dtype) for name, tensor in tensors.items()}
    data = {name: encoded(name, tensor, kinds[name]) for name, tensor in tensors.items()}
    metadata = {"general.name": loaded.recipe.name, "general.file_type": TYPES[dtype][2]}
    if "Q8_0" in kinds.values() or "MXFP4" in kinds.values():
        metadata["general.quantization_version"] = 2
    architecture = ARCHITECTURES[chosen.name].name
    metadata |= {f"{architecture}.{key}": value for key, value in keys.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}
    _write(file, architecture, metadata, data, kinds)
    found = {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}
    return ExportedGGUF(file, architecture, sum(tensor.numel() for tensor in tensors.values()), found, loaded.step)


def gguf_model(family: Family, model: Decoder, recipe: Recipe) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata, without the architecture before the keys, and tensors in the dtype of the model."""
    tensors, config = exported_tensors(family, model, recipe.model)
    keys = family.config(config, model.embedding_scale) | {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": max_length(recipe),
    }
    return ARCHITECTURES[family.name].keys(keys), gguf_tensors(family, keys, tensors)


def _choose(recipe: Recipe, wanted: str | None) -> Family:
    """The first family that fits and that llama.cpp runs."""
    every = fits(recipe.model)
    if wanted is not None and wanted not in every:
        raise ValueError(f"--family {wanted}: must be one of {', '.join(ARCHITECTURES)}")
    reasons = {}
    for name in [wanted] if wanted else every:
        family = next(family for family in FAMILIES if family.name == name)
        reasons[name] = every[name] or obstacles(family, recipe.model)
        if not reasons[name]:
            return family
    nearest = min(reasons, key=lambda name: (len(every[name]) > 0, len(reasons[name]), list(reasons).index(name)))
    start = "" if wanted else "llama.cpp runs no such model; the nearest is "
    raise ValueError(f"{start}{nearest}: {'; '.join(map(str, reasons[nearest]))}")


def _decode(model: Decoder, dtype: str, run_dir: Path) -> None:
    """Give a model the values of its quantised weights."""
    formats = {weight.format for weight in quantized_weights(model).values()}
    if formats and (formats != {"mxfp4"} or dtype != "mxfp4"):
        shown = ", ".join(sorted(formats))
        raise ValueError(f"{run_dir}: its layers are {shown}; export mxfp4 with --dtype mxfp4, others not quantised")
    decode_layers(model)


def require_gguf(what: str):
    """The package gguf, which is an optional one.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{what} needs the package gguf: pip install 'fusedlm[gguf]'") from None
    return gguf


def _write(file: Path, architecture: str, metadata: dict, data: dict, kinds: dict[str, str]) -> None:
    gguf = require_gguf("--to gguf")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.parent / f".{file.name}-{secrets.token_hex(8)}.tmp"
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, array in data.items():
            kind = getattr(gguf.GGMLQuantizationType, kinds[name])
            writer.add_tensor(name, array, raw_dtype=None if kinds[name] in ("F32", "F16") else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except OSError as error:
        raise OSError(f"{file} could not be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _add(writer, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # an empty list has no type of its elements
        writer.add_array(key, value)
