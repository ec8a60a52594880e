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
from fusedlm.export.config_json import ConfigJSON
from fusedlm.export.families import FAMILIES
from fusedlm.export.families.base import Family
from fusedlm.export.origin import ORIGIN, Origin, read_origin
from fusedlm.export.remote.target import MODEL_CLASS, MODEL_TYPE, PADDED, PREFIX
from fusedlm.export.shards import read_weights
from fusedlm.export.to_hf import CONFIG
from fusedlm.export.tokenizer import TOKENIZER, TOKENIZER_CONFIG, restored_tokenizer
from fusedlm.export.weights import read, same
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
    """Make a run of a model of one of the families, at step 0: `eval`, `generate` and the other commands read it. Of a
    GGUF file, `import_gguf` does.

    Of weights that `export_run` wrote the recipe is that of the run, if config.json was not changed since. Of others it
    is made from config.json, with a section `train` that is a place holder.

    Args:
        run_dir: holds no run yet.

    Raises:
        ValueError: the model is of no family or has what our decoder does not compute, and which key says so; a file is
            missing or damaged; or the folder holds a run.
        OSError: a file cannot be read or written.
    """
    return write_run(run_dir, read_folder(Path(folder)))


def load_folder(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Decoder, Tokenizer]:
    """The model of such a folder in eval mode, with float32 parameters, and its tokenizer; nothing is written.

    Raises:
        ValueError, OSError: as `import_run`.
    """
    found = read_folder(Path(folder))
    model = found.model.to_empty(device=device)
    load_model_tensors(model, found.tensors, str(folder))
    return model.eval(), found.tokenizer


@dataclass(frozen=True)
class Content:
    """What was read of another program. form, architecture: what it is there. model: on the meta device. tensors: ours,
    in float32."""

    form: str
    architecture: str
    recipe: Recipe
    tokenizer: Tokenizer
    origin: Origin | None
    model: Decoder
    tensors: dict[str, torch.Tensor]

    @property
    def text(self) -> str:
        """Fingerprint of the prepared text that it was trained with, where that is known."""
        return NO_TEXT if self.origin is None else self.origin.text


def write_run(run_dir: str | Path, found: Content) -> Imported:
    """A run at step 0.

    Raises:
        ValueError: the folder holds a run.
        OSError: it cannot be written.
    """
    run_dir, run = Path(run_dir), new_run_id()
    with RunFolder(run_dir) as target:
        if target.holds_run():
            raise ValueError(f"run folder {run_dir} already holds a run; name another")
        described = environment(torch.device("cpu"), torch.float32) | {"imported": found.architecture}
        target.write_header(found.recipe, found.tokenizer, described, run)
        state = TrainState(data=found.text, run=run, tokenizer=found.tokenizer.fingerprint)
        save_weights(target.checkpoints, state, found.recipe, found.tensors)
    return Imported(run_dir, found.form, count_parameters(found.model).total)


def read_folder(folder: Path) -> Content:
    """Raises ValueError, OSError: as `import_run`."""
    config = ConfigJSON(_read_json(folder / CONFIG), folder / CONFIG)
    origin = read_origin(folder)
    if config.text("model_type") == MODEL_TYPE:
        return _read_code(folder, config, origin)
    family = family_of(config)
    derived = model_section(family, config)
    tokenizer = _tokenizer(folder, config, origin)
    if origin is not None and _agrees(family, origin.recipe.model, derived, config):
        recipe = origin.recipe
    else:
        recipe = placeholder_recipe(folder, folder / TOKENIZER, family, config, derived, tokenizer)
    return content_of(folder, family, recipe, tokenizer, read_weights(folder), origin)


def content_of(
    source: Path,
    family: Family,
    recipe: Recipe,
    tokenizer: Tokenizer,
    tensors: dict[str, torch.Tensor],
    origin: Origin | None = None,
) -> Content:
    """Of the tensors of a class.

    Args:
        source: names them in errors.
    """
    model = build_model(recipe.model, vocab_size=tokenizer.vocab_size, device="meta")
    ours = _tensors(source, tensors, family, recipe.model, model)
    return Content(family.name, family.architecture, recipe, tokenizer, origin, model, ours)


def _read_code(folder: Path, config: ConfigJSON, origin: Origin | None) -> Content:
    """Of a folder with a file of code; the code is not run: recipe and tensors are those of the run."""
    if origin is None:
        raise ValueError(f"{folder / ORIGIN}: No such file; it holds the recipe of a model with code of its own")
    tokenizer = _tokenizer(folder, config, origin)
    model = build_model(origin.recipe.model, vocab_size=tokenizer.vocab_size, device="meta")
    found = read_weights(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    cropped = {name: (model.vocab_size, *shape[1:]) if name in PADDED else shape for name, shape in shapes.items()}
    try:
        tensors = read([same(name, PREFIX + name) for name in shapes], found, cropped)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    tensors = {
        name: _padded(tensor.float(), shapes[name][0]) if name in PADDED else tensor.float()
        for name, tensor in tensors.items()
    }
    return Content("hf-code", MODEL_CLASS, origin.recipe, tokenizer, origin, model, tensors)


def _padded(tensor: torch.Tensor, n_rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, n_rows - len(tensor)))


def family_of(config: ConfigJSON) -> Family:
    """Raises ValueError if there is none of its model_type."""
    kind = config.text("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise config.refusal("model_type", f"must be one of {known}")


def model_section(family: Family, config: ConfigJSON) -> ModelConfig:
    """Raises ValueError if our decoder does not compute it; names the key."""
    try:
        return ModelConfig.model_validate(family.model(config))
    except pydantic.ValidationError as error:
        raise ValueError(f"{config.path}: model.{describe(error, ModelConfig)}") from None


def placeholder_recipe(
    source: Path,
    tokenizer_file: Path,
    family: Family,
    config: ConfigJSON,
    derived: ModelConfig,
    tokenizer: Tokenizer,
) -> Recipe:
    """A recipe of a model of another program; its section `train` is a place holder.

    Args:
        source: gives the name.
        tokenizer_file: the path that the recipe names.
        derived: the model section.
    """
    yarn = derived.yarn
    length = config.integer("max_position_embeddings", 2048) if yarn is None else yarn.trained_length
    data = {}
    if hasattr(tokenizer, "end_of_text"):
        path = str(tokenizer_file.resolve())
        data = {"tokenizer": {"type": "file", "path": path, "end_of_text": tokenizer.end_of_text}}
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in source.resolve().name).lstrip(".")
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


def _tensors(
    folder: Path, found: dict[str, torch.Tensor], family: Family, config: ModelConfig, model: Decoder
) -> dict[str, torch.Tensor]:
    """Our tensors in float32. Rows of the vocabulary that belong to no token are zero: nothing reads them."""
    found = dict(found)
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
            tensors[name] = _padded(tensors[name], shapes[name][0])
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
