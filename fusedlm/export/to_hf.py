"""A run as a folder that Transformers loads: as one of its classes, or with a file of code."""

import json
import os
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fusedlm.config import Recipe
from fusedlm.config.model import ModelConfig
from fusedlm.data.tokenizer import Tokenizer
from fusedlm.export.card import Figures, model_card
from fusedlm.export.families import choose_family
from fusedlm.export.families.base import Family
from fusedlm.export.fold import folded
from fusedlm.export.origin import ORIGIN, Origin
from fusedlm.export.remote.target import FILE, MODEL_CLASS, remote_code
from fusedlm.export.shards import SHARD_BYTES, write_weights
from fusedlm.export.tokenizer import tokenizer_files
from fusedlm.export.weights import written
from fusedlm.files import sync
from fusedlm.model import Decoder
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.folder import CHECKPOINTS
from fusedlm.runs.load import Weights, load_checkpoint
from fusedlm.runs.quantization import is_quantized
from fusedlm.runs.state import model_tensors, read_state

CONFIG, GENERATION_CONFIG, CARD = "config.json", "generation_config.json", "README.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written. files: names in the folder. card: the text of its model card, and the figures in it."""

    folder: Path
    family: str
    architecture: str
    parameters: int
    files: list[str]
    card: str
    figures: Figures


def export_run(
    run_dir: str | Path,
    folder: str | Path,
    *,
    family: str | None = None,
    code: bool = False,
    dtype: str = "float32",
    checkpoint: Literal["last", "best"] | int = "last",
    weights: Weights = "raw",
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the model of a run for Transformers: configuration, weights, tokenizer, model card.

    Args:
        folder: does not exist, or is empty; it is complete or absent.
        family: name of the class; None: the first that the recipe fits (`fusedlm.export.families`).
        code: write the model as it is, with a file of code, in place of a class; any recipe fits.
        dtype: of the weights: float32, bfloat16 or float16.
        checkpoint, weights: as `fusedlm.load` takes them.
        shard_bytes: most bytes of weights per file.

    Raises:
        ValueError: no family fits, and which keys stand in the way; both family and code are given; the folder is not
            empty; weights are beyond the range of the dtype; or as `fusedlm.load`.
        OSError: a file cannot be read or written.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if code and family is not None:
        raise ValueError(f"--family {family}: --to hf-code writes no class of Transformers; leave one of them out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; name a folder that does not")
    loaded = load_checkpoint(run_dir, checkpoint=checkpoint, weights=weights, device="cpu")
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    if is_quantized(checkpoints, loaded.step):
        raise ValueError(f"{run_dir}: its layers are quantised; export the run that it was made of")
    recipe, tokenizer = loaded.recipe, loaded.tokenizer
    found = _as_code(loaded.model, recipe) if code else _as_class(loaded.model, recipe, family)
    tensors = {
        name: tensor if name in found.unrounded else _converted(name, tensor, dtype)
        for name, tensor in found.tensors.items()
    }
    state = read_state(checkpoints, loaded.step)
    raw = weights == "raw"  # validation figures of averages are in the metrics alone
    figures = Figures(
        sum(tensor.numel() for tensor in tensors.values()),
        loaded.step,
        weights,
        state.val_bpb if raw else None,
        state.validated_step,
    )
    texts = {
        CONFIG: _json(_config_json(found, loaded.model, recipe, tokenizer, dtype)),
        GENERATION_CONFIG: _json(_token_ids(tokenizer)),
        CARD: model_card(recipe, found.architecture, figures, code=code),
        ORIGIN: Origin(recipe.model_copy(update={"model": found.model}), loaded.text, tokenizer.fingerprint).dump(),
    } | tokenizer_files(tokenizer, max_length(recipe))
    files = _write(folder, tensors, texts | found.texts, shard_bytes)
    return Exported(folder, found.name, found.architecture, figures.parameters, files, texts[CARD], figures)


@dataclass(frozen=True)
class _Form:
    """What a model becomes.

    model: the model section of the tensors. keys: of config.json. unrounded: tensors that stay in float32.
    texts: further files.
    """

    name: str
    architecture: str
    model: ModelConfig
    tensors: dict[str, torch.Tensor]
    keys: dict
    unrounded: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)


def _as_class(model: Decoder, recipe: Recipe, wanted: str | None) -> _Form:
    family = choose_family(recipe.model, wanted)
    tensors, config = exported_tensors(family, model, recipe.model)
    keys = {"model_type": family.model_type, **family.config(config, model.embedding_scale)}
    return _Form(family.name, family.architecture, config, tensors, keys)


def _as_code(model: Decoder, recipe: Recipe) -> _Form:
    written = remote_code(model, recipe.model)
    return _Form(
        "hf-code",
        MODEL_CLASS,
        written.model,
        written.tensors,
        written.keys,
        written.unrounded,
        {FILE: written.text},
    )


def exported_tensors(
    family: Family, model: Decoder, config: ModelConfig
) -> tuple[dict[str, torch.Tensor], ModelConfig]:
    """The tensors of the class, in the dtype of the decoder, and the model section that they are of: without constant
    factors, and with as many rows of the embedding as there are tokens."""
    ours = {name: tensor.detach() for name, tensor in model_tensors(model).items()}
    tensors, config = folded(model, config, ours, keep_embedding_scale=family.keeps_embedding_scale)
    for name in ("embedding.weight", "head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][: model.vocab_size]
    return written(family.rules(config), tensors), config


def _config_json(found: _Form, model: Decoder, recipe: Recipe, tokenizer: Tokenizer, dtype: str) -> dict:
    return {
        "architectures": [found.architecture],
        **found.keys,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": max_length(recipe),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    } | _token_ids(tokenizer)


def max_length(recipe: Recipe) -> int:
    """Tokens of the longest text that a model is for."""
    yarn = recipe.model.yarn
    return recipe.train.seq_len if yarn is None else max(recipe.train.seq_len, int(yarn.factor * yarn.trained_length))


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {f"{name}_token_id": tokenizer.eot_id for name in ("bos", "eos", "pad")}


def _converted(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    found = tensor.to(DTYPES[dtype])
    if tensor.isfinite().all() and not found.isfinite().all():
        raise ValueError(f"--dtype {dtype}: tensor {name} has values beyond its range; use bfloat16 or float32")
    return found


def _write(folder: Path, tensors: dict[str, torch.Tensor], texts: dict[str, str], shard_bytes: int) -> list[str]:
    """Write all under a temporary name beside the folder, and rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}-{secrets.token_hex(8)}.tmp"
    try:
        temporary.mkdir()
        files = write_weights(temporary, tensors, shard_bytes)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            sync(path)
        os.replace(temporary, folder)
        sync(folder.parent)
    except OSError as error:
        raise OSError(f"{folder} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted([*files, *texts])


def _json(tree: dict) -> str:
    return json.dumps(tree, indent=2) + "\n"
