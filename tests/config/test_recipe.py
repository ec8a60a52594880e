"""Recipes: reading, overriding, refusing and writing them."""

from pathlib import Path

import pytest
import yaml

from fusedlm import load_recipe
from fusedlm.config import dump_recipe, parse_recipe
from fusedlm.config.recipe import with_overrides
from fusedlm.config.schema import Config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = """
name: small
model:
  dim: 64
  n_layers: 3
  pattern: gm
  blocks:
    g: {mixer: {type: gdn, n_heads: 2}, ffn: {type: relu2}}
    m: {mixer: {type: mla, n_heads: 2, kv_rank: 16}, ffn: {type: swiglu}}
train: {steps: 10, seq_len: 16, batch_size: 4}
"""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_round_trip(path: Path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    text = dump_recipe(recipe)
    assert parse_recipe(text) == recipe
    assert dump_recipe(parse_recipe(text)) == text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_resolved_recipe_names_every_key(path: Path):
    """So that a saved recipe keeps the defaults of its time."""

    def check(config, written):
        if isinstance(config, Config):
            for name in type(config).model_fields:
                check(getattr(config, name), written[name])
        elif isinstance(config, dict):
            for name, value in config.items():
                check(value, written[name])
        else:
            assert written == config

    recipe = load_recipe(path)
    written = yaml.safe_load(dump_recipe(recipe))
    check(recipe, written)
    assert {"backends", "dtype"} <= set(written["runtime"]) and "type" in written["train"]["optimizer"]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.optimizer.lr=3e-4", "train.optimizer.lr", 3e-4),
        ("train.optimizer.lr=1E+1", "train.optimizer.lr", 10.0),
        ("train.grad_clip=null", "train.grad_clip", None),
        ("runtime.compile=true", "runtime.compile", True),
        ("train.loggers=[tensorboard]", "train.loggers", ["tensorboard"]),
        ("train.schedule={type: cosine, final: 0.0}", "train.schedule.final", 0.0),
        ("data.source={type: text, path: a.txt}", "data.source.path", "a.txt"),
        ("data.source.type=sotu", "data.source.type", "sotu"),
        ("data.split.fraction=0.25", "data.split.fraction", 0.25),
        ("train.schedule.type=cosine", "train.schedule.final", 0.1),
        ("train.schedule.decay=0.5", "train.schedule.decay", 0.5),
        ("model.blocks.g.mixer.n_heads=4", "model.blocks.g.mixer.n_heads", 4),
        ("model.blocks.m.ffn.type=relu2", "model.blocks.m.ffn.type", "relu2"),
        ("runtime.backends.attention=reference", "runtime.backends.attention", "reference"),
        ("train.optimizer={type: sgd, momentum: 0.5}", "train.optimizer.momentum", 0.5),
        ("train.optimizer.type=sgd", "train.optimizer.lr", 0.1),
        ("sample_prompt=a = b", "sample_prompt", "a = b"),
        ("description=", "description", ""),
    ],
)
def test_overrides(override: str, path: str, value):
    node = parse_recipe(SMALL, [override])
    for part in path.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    assert node == value and type(node) is type(value)


def test_overrides_apply_in_order():
    recipe = parse_recipe(SMALL, ["train.steps=5", "train.steps=6", "model.n_layers=1", "model.pattern=g"])
    assert (recipe.train.steps, recipe.model.n_layers, recipe.model.pattern) == (6, 1, "g")


def test_override_does_not_change_the_file(tmp_path: Path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    assert load_recipe(path, ["train.steps=99"]).train.steps == 99
    assert path.read_text() == SMALL


def test_overrides_of_one_section():
    recipe = parse_recipe(SMALL, ["runtime.backends.attention=sdpa"])
    changed = with_overrides(recipe, ["runtime.dtype=float32", "runtime.backends.attention=auto"], "runtime")
    assert (changed.runtime.dtype, changed.runtime.backends) == ("float32", {"attention": "auto"})
    assert changed.model_copy(update={"runtime": recipe.runtime}) == recipe
    assert with_overrides(recipe, [], "runtime") == recipe
    for other in ("train.steps=3", "runtimes.dtype=float32", "runtime=3"):
        with pytest.raises(ValueError, match=f"override '{other}': only keys of section runtime can be changed here"):
            with_overrides(recipe, [other], "runtime")
    with pytest.raises(ValueError, match="runtime.dtyp: unknown key; did you mean 'dtype'"):
        with_overrides(recipe, ["runtime.dtyp=float32"], "runtime")


def test_recipes_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(SMALL).train.steps = 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean 'steps'"]),
        ("trian.steps=3", ["trian", "did you mean 'train'"]),
        ("model.blocks.g.mixer.n_head=3", ["model.blocks.g.mixer.n_head", "did you mean 'n_heads'"]),
        ("model.blocks.g.ffn.slop=0.5", ["model.blocks.g.ffn.slop", "did you mean 'slope'"]),
        ("data.tokenizer.vocab=300", ["data.tokenizer.type: required", "'bytes', 'bpe', 'file'"]),
        ("train.optimizer.momentum=0.9", ["train.optimizer.type: required", "'adamw', 'sgd'"]),
        ("train.optimizer={lr: 0.1}", ["train.optimizer.type: required", "'adamw', 'sgd'"]),
        ("train.optimizer={type: adamw, momentun: 0.9}", ["train.optimizer.momentun", "known: beta1, beta2"]),
        ("train.optimizer={type: sgd, momentun: 0.9}", ["train.optimizer.momentun", "did you mean 'momentum'"]),
        ("train.optimizer={type: sgd, momentum: 0, nesterov: true}", ["nesterov=true: needs momentum greater than 0"]),
        ("train.optimizer.type=adam", ["train.optimizer.type", "'adam' is not one of 'adamw', 'sgd'"]),
        ("train.compile=true", ["train.compile: unknown key; did you mean runtime.compile?"]),
        ("train.device=cpu", ["train.device: unknown key; did you mean runtime.device?"]),
        ("model.impl.attention=flash", ["model.impl: unknown key"]),
        ("runtime.backends={attention: 1}", ["runtime.backends.attention", "1", "string"]),
        ("model.blocks.g.mixer.type=mamba", ["model.blocks.g.mixer.type", "'mamba'", "'gdn'"]),
        ("model.blocks.g.mixer={n_heads: 2}", ["model.blocks.g.mixer.type: required"]),
        ("model.dim=0", ["model.dim", "0", "greater than 0"]),
        ("model.dim=64.0", ["model.dim", "64.0", "integer"]),
        ("model.dim='64'", ["model.dim", "'64'", "integer"]),
        ("model.dim=[64]", ["model.dim", "list"]),
        ("model.dim=true", ["model.dim", "True"]),
        ("model.dim=65", ["blocks.g.mixer", "n_heads=2 does not divide dim=65"]),
        ("model.pattern=gx", ["'x'", "['g', 'm']"]),
        ("model.blocks.m.mixer.rope_dim=7", ["rope_dim=7: must be even"]),
        ("model.blocks.m.mixer.n_kv_groups=3", ["n_kv_groups=3 does not divide n_heads=2"]),
        ("model.dropout=1.0", ["model.dropout", "1.0"]),
        ("model.blocks.g.ffn.slope=2", ["model.blocks.g.ffn.slope", "2"]),
        ("train.optimizer.lr=.nan", ["train.optimizer.lr", "nan"]),
        ("train.optimizer.lr=-1e-3", ["train.optimizer.lr", "-0.001"]),
        ("train.micro_batch_size=3", ["micro_batch_size=3 does not divide batch_size=4"]),
        ("train.schedule={type: wsd, warmup: 0.6, decay: 0.6}", ["warmup=0.6", "decay=0.6"]),
        ("train.loggers=[wandb, wandb]", ["loggers", "a logger is repeated"]),
        ("train.seed=-1", ["train.seed", "-1"]),
        ("runtime.device=tpu", ["runtime.device", "'tpu'"]),
        ("data.validation={type: sotu}", ["same text as source"]),
        ("data.split.fraction=0", ["data.split.fraction", "got 0"]),
        ("data.tokenizer={type: bpe, vocab_size: 100}", ["data.tokenizer.vocab_size", "100", "257"]),
        ("name=a b", ["name", "'a b'"]),
        ("train=5", ["train", "5"]),
        ("data.split={type: hash, fraction: 0}", ["data.split.fraction", "0"]),
        ("data.tokenizer={type: bytes, vocab: 3}", ["data.tokenizer.vocab", "known: type"]),
        ("train.steps", ["'train.steps'", "key.path=value"]),
        ("=5", ["'=5'", "key.path=value"]),
        ("train..steps=5", ["'train..steps=5'", "key.path=value"]),
        ("train.steps.x=5", ["'train.steps.x=5'", "train.steps is a value, not a section"]),
        ("train.steps=[1", ["'train.steps=[1'", "YAML"]),
    ],
)
def test_bad_override_is_one_line_that_names_it(override: str, expected: list[str]):
    with pytest.raises(ValueError) as caught:
        parse_recipe(SMALL, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "top level"),
        ("- a\n- b\n", "top level"),
        ("just words", "top level"),
        ("name: x\nmodel: {", "YAML line"),
        ("name: x\n\tmodel: 1\n", "YAML line 2"),
        ("name: x\nname: y\n", "'name' is given twice"),
        (SMALL + "  steps: 3\n", "YAML line"),
        (SMALL.replace("  dim: 64\n", ""), "model.dim: required"),
        (SMALL.replace("name: small\n", ""), "name: required"),
        (SMALL.split("train:")[0], "train: required"),
        (SMALL.replace("train:", "trian:"), "trian: unknown key; did you mean 'train'?"),
        ("1: x\n", "key 1 is not a string"),
        ("? [a, b]\n: c\n", "is not a string"),
        ("x: !!python/object/apply:os.system [ls]\n", "line 1: tag '!!python/object/apply:os.system' is not supported"),
        ("x: &a [*a]\n", "line 1: an alias contains itself"),
        ("x: *nowhere\n", "undefined alias"),
        ("[" * 5000, "nested too deeply"),
        ("name: \x00", "special characters are not allowed"),
    ],
)
def test_malformed_text_is_one_line(text: str, expected: str):
    with pytest.raises(ValueError) as caught:
        parse_recipe(text)
    message = str(caught.value)
    assert expected in message and "\n" not in message


def test_unreadable_files_are_named(tmp_path: Path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: é".encode("latin-1"))
    for path, reason in [(tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), (latin, "not UTF-8")]:
        with pytest.raises(ValueError, match=reason) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
