"""A run folder from a folder that Transformers reads: the inverse of `export_run`, and for models of other programs."""

import json
from dataclasses import dataclass
from pathlib import Path

import pydantic
import torch

from fusedlm.config import Recipe
from fusedlm.config.errors import describe
from fusedlm.config.model import ModelConfig
from fusedlm.data.tokenizer import Tokenizer
from fusedlm.data.vocabulary import check_vocab_size
from fusedlm.distributed import World
from fusedlm.export.config_json import ConfigJSON
from fusedlm.export.families import FAMILIES
from fusedlm.export.families.base import Family
from fusedlm.export.origin import Origin, read_origin
from fusedlm.export.shards import read_weights
from fusedlm.export.to_hf import CONFIG
from fusedlm.export.tokenizer import TOKENIZER, TOKENIZER_CONFIG, restored_tokenizer
from fusedlm.export.weights import read
from fusedlm.model import Decoder, build_model
from fusedlm.model.accounting import count_parameters
from fusedlm.runs.folder import RunFolder
from fusedlm.runs.hardware import environment
from fusedlm.runs.identity import new_run_id
from fusedlm.runs.state import TrainState, load_model_tensors, model_tensors, save_weights
from fusedlm.runs.text import NO_TEXT

_LARGEST_JSON = 1 << 26


@dataclass(frozen=True)
class Imported:
    """What was written."""

    run_dir: Path
    family: str
    parameters: int


def import_run(folder: str | Path, run_dir: str | Path) -> Imported:
    """Make a run of a model of one of the families, at step 0: `eval`, `generate` and the other commands read it.

    Of weights that `export_run` wrote the recipe is that of the run, if config.json was not changed since. Of others it
    is made from config.json, with a section `train` that is a place holder.

    Args:
        run_dir: holds no run yet.

    Raises:
        ValueError: the model is of no family or has what our decoder does not compute, and which key says so; a file is
            missing or damaged; or the folder holds a run.
        OSError: a file cannot be read or written.
    """
    run_dir, found = Path(run_dir), _read(Path(folder))
    recipe, tokenizer, origin = found.recipe, found.tokenizer, found.origin
    run, world = new_run_id(), World()
    with RunFolder(run_dir) as target:
        if target.holds_run():
            raise ValueError(f"run folder {run_dir} already holds a run; name another")
        described = environment(torch.device("cpu"), torch.float32) | {"imported": found.family.architecture}
        target.write_header(recipe, tokenizer, described, run)
        text = origin.text if origin is not None else NO_TEXT
        state = TrainState(data=text, run=run, tokenizer=tokenizer.fingerprint)
        save_weights(target.checkpoints, state, recipe, found.tensors, world=world)
    return Imported(run_dir, found.family.name, count_parameters(found.model).total)


def load_folder(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Decoder, Tokenizer]:
    """The model of such a folder in eval mode, with float32 parameters, and its tokenizer; nothing is written.

    Raises:
        ValueError, OSError: as `import_run`.
    """
    found = _read(Path(folder))
    model = found.model.to_empty(device=device)
    load_model_tensors(model, found.tensors, str(folder))
    return model.eval(), found.tokenizer


@dataclass(frozen=True)
class _Content:
    """What a folder holds; the model is on the meta device."""

    family: Family
    recipe: Recipe
    tokenizer: Tokenizer
    origin: Origin | None
    model: Decoder
    tensors: dict[str, torch.Tensor]


def _read(folder: Path) -> _Content:
    config = ConfigJSON(_read_json(folder / CONFIG), folder / CONFIG)
    family = _family_of(config)
    origin = read_origin(folder)
    tree = family.model(config)
    derived = _model_section(tree, config)
    tokenizer = _tokenizer(folder, config, origin)
    recipe = _recipe(folder, family, config, derived, tokenizer, origin)
    model = build_model(recipe.model, vocab_size=tokenizer.vocab_size, device="meta")
    return _Content(family, recipe, tokenizer, origin, model, _tensors(folder, family, recipe.model, model))


def _family_of(config: ConfigJSON) -> Family:
    kind = config.text("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise config.refusal("model_type", f"must be one of {known}")


def _model_section(tree: dict, config: ConfigJSON) -> ModelConfig:
    try:
        return ModelConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ValueError(f"{config.path}: model.{describe(error, ModelConfig)}") from None


def _recipe(
    folder: Path,
    family: Family,
    config: ConfigJSON,
    derived: ModelConfig,
    tokenizer: Tokenizer,
    origin: Origin | None,
) -> Recipe:
    if origin is not None and _agrees(family, origin.recipe.model, derived, config):
        return origin.recipe
    yarn = derived.yarn
    length = config.integer("max_position_embeddings", 2048) if yarn is None else yarn.trained_length
    data = {}
    if hasattr(tokenizer, "end_of_text"):
        path = str((folder / TOKENIZER).resolve())
        data = {"tokenizer": {"type": "file", "path": path, "end_of_text": tokenizer.end_of_text}}
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in folder.resolve().name).lstrip(".")
    tree = {
        "name": name[:200] or family.name,
        "description": f"{family.architecture}, imported; the section train is a place holder.",
        "model": derived.model_dump(),
        "data": data,
        "train": {"steps": 1, "seq_len": length, "batch_size": 1},
    }
    try:
        recipe = Recipe.model_validate(tree)
        if data:
            check_vocab_size(recipe.data.tokenizer, tokenizer.vocab_size)
        return recipe
    except pydantic.ValidationError as error:
        raise ValueError(f"{config.path}: {describe(error, Recipe)}") from None


def _agrees(family: Family, model: ModelConfig, derived: ModelConfig, config: ConfigJSON) -> bool:
    """Whether a model section is the one that the configuration was written from."""
    if family.obstacles(model):
        return False
    scale = config.number("embedding_multiplier", 1.0) if family.keeps_embedding_scale else 1.0
    own = build_model(model, vocab_size=1, device="meta").embedding_scale
    return own == scale and family.config(model, scale) == family.config(derived, scale)


def _tokenizer(folder: Path, config: ConfigJSON, origin: Origin | None) -> Tokenizer:
    path = folder / TOKENIZER
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: No such file; a tokenizer is read from tokenizer.json alone") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from None
    described = _read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
    eos = described.get("eos_token")
    end_of_text = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(end_of_text, str):
        raise ValueError(f"{folder / TOKENIZER_CONFIG}: eos_token={eos!r}: must name the token that ends a text")
    try:
        tokenizer = restored_tokenizer(content, end_of_text, None if origin is None else origin.tokenizer)
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}") from None
    size = config.integer("vocab_size")
    if tokenizer.vocab_size > size:
        raise config.refusal("vocab_size", f"the tokenizer has {tokenizer.vocab_size} tokens")
    return tokenizer


def _tensors(folder: Path, family: Family, config: ModelConfig, model) -> dict[str, torch.Tensor]:
    """Our tensors in float32. Rows of the vocabulary that belong to no token are zero: nothing reads them."""
    found = read_weights(folder)
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)  # a copy of the embedding, which some programs write
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in found:
            found[name] = found[name][: model.vocab_size]
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{folder}: tensor {name!r} is {tensor.dtype}; weights are floating-point numbers here")
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    cropped = {
        name: (model.vocab_size, *shape[1:]) if name in ("embedding.weight", "head.weight") else shape
        for name, shape in shapes.items()
    }
    try:
        tensors = {name: tensor.float() for name, tensor in read(family.rules(config), found, cropped).items()}
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for name in ("embedding.weight", "head.weight"):
        if name in tensors:
            padding = shapes[name][0] - model.vocab_size
            tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, padding))
    return tensors


def _read_json(path: Path) -> dict:
    """Raises ValueError if a file is not a JSON object."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("too large")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise ValueError(f"{path}: No such file; name a folder that Transformers reads") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON of a model ({' '.join(str(error).split())[:100]})") from None
    return tree
