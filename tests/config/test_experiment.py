"""Experiments: reading, overriding and refusing them."""

from pathlib import Path

import pytest

from fusedlm.config import parse_recipe
from fusedlm.config.experiment import Experiment, dump_experiment, load_experiment, scale_rates

BASE = """
name: base
model:
  dim: 32
  n_layers: 2
  pattern: a
  blocks:
    a: {mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu}}
    g: {mixer: {type: gdn, n_heads: 2}, ffn: {type: swiglu}}
train: {steps: 10, seq_len: 16, batch_size: 4}
"""
EXPERIMENT = """
name: trial
base: recipes/base.yaml
overrides: [train.batch_size=8]
seeds: [3, 5]
variants:
  plain:
  hybrid: [model.pattern=ga]
  wide: {model.dim: 64, train.optimizer: {type: adamw, lr: 1e-3}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/base.yaml").write_text(BASE)
    file = tmp_path / "trial.yaml"
    file.write_text(EXPERIMENT)
    return file


def test_variants_are_the_base_with_their_overrides(path: Path):
    experiment, recipes = load_experiment(path)
    assert list(recipes) == ["plain", "hybrid", "wide"]
    base = parse_recipe(BASE, ["train.batch_size=8", "train.seed=3"])
    assert recipes["plain"] == base.model_copy(update={"name": "trial-plain-seed3"})
    assert recipes["hybrid"].model.pattern == "ga" and recipes["hybrid"].train == base.train
    assert recipes["wide"].model.dim == 64 and recipes["wide"].train.optimizer.lr == 1e-3
    assert experiment.match == "none" and experiment.decode_lengths == [1024, 8192, 65536]


def test_the_base_path_is_relative_to_the_file(path: Path, monkeypatch):
    monkeypatch.chdir("/")
    assert Path(load_experiment(path)[0].base) == path.parent / "recipes/base.yaml"


def test_overrides_of_recipes_reach_every_variant(path: Path):
    experiment, recipes = load_experiment(path, ["train.steps=7", "train.batch_size=2"])
    assert {(recipe.train.steps, recipe.train.batch_size) for recipe in recipes.values()} == {(7, 2)}
    assert experiment.overrides == ["train.batch_size=8", "train.steps=7", "train.batch_size=2"]


def test_overrides_with_the_prefix_change_the_experiment(path: Path):
    changes = ["seeds=[0]", "match=flops", "name=other", "variants.hybrid=[model.pattern=g]"]
    experiment, recipes = load_experiment(path, [f"experiment.{change}" for change in changes])
    assert (experiment.seeds, experiment.match, experiment.name) == ([0], "flops", "other")
    assert recipes["hybrid"].model.pattern == "g" and recipes["hybrid"].name == "other-hybrid-seed0"


def test_an_integer_of_seeds_counts_from_zero(path: Path):
    assert load_experiment(path, ["experiment.seeds=3"])[0].seeds == [0, 1, 2]


def test_round_trip(path: Path):
    experiment, recipes = load_experiment(path, ["train.steps=7", "experiment.tune={}"])
    assert experiment.tune.lr_factors == [0.5, 1, 2] and experiment.tune.seed == 1000
    again = path.with_name("again.yaml")
    again.write_text(dump_experiment(experiment))
    assert load_experiment(again) == (experiment, recipes)
    assert isinstance(experiment, Experiment)


BAD_OVERRIDES = {
    "train.stepz=1": "train.stepz: unknown key; did you mean 'steps'?",
    "train.steps=many": "train.steps: got 'many'",
    "train.steps": "'train.steps': must have the form",
    "seeds=[0]": "the key of the experiment is experiment.seeds",
    "name=x": "the command line: 'name=x' is not allowed, since the experiment sets name; use experiment.name",
    "train.seed=1": "experiment.seeds",
    "experiment.sed=1": "sed: unknown key; did you mean 'seeds'?",
    "experiment.seeds=0": "a number of seeds must be at least 1",
    "experiment.seeds=[]": "seeds",
    "experiment.seeds=[1, 1]": "seeds=[1, 1]: a seed is repeated",
    "experiment.seeds=[-1]": "seeds.0: got -1",
    "experiment.seeds=two": "seeds: got 'two'",
    "experiment.match=size": "match: got 'size'",
    "experiment.match_by=heads": "match_by: got 'heads'",
    "experiment.variants={}": "variants",
    "experiment.variants=[a]": "variants: got 'list'",
    "experiment.variants={a/b: []}": "a/b",
    "experiment.variants={a: [train.seed=1]}": "variants.a: 'train.seed=1' is not allowed",
    "experiment.variants={a: [model.dims=1]}": "variant a of",
    "experiment.overrides=[name=x]": "overrides: 'name=x' is not allowed",
    "experiment.decode_lengths=[8, 4]": "decode_lengths=[8, 4]: must be increasing",
    "experiment.tune={lr_factors: [1, 2, 1.0]}": "tune: lr_factors=[1.0, 2.0, 1.0]: a factor is repeated; remove it",
    "experiment.tune={lr_factors: [1, 0]}": "tune.lr_factors.1: got 0, input should be greater than 0",
    "experiment.tune={lr_factors: [-1]}": "tune.lr_factors.0: got -1",
    "experiment.tune={lr_factors: []}": "tune.lr_factors",
    f"experiment.tune={{lr_factors: {list(range(1, 102))}}}": "should have at most 100 items",
    "experiment.tune={lr_factors: [1.0e+7]}": "tune.lr_factors.0: got 10000000.0",
    "experiment.tune={factors: [1]}": "tune.factors: unknown key; did you mean 'lr_factors'?",
    "experiment.tune={seed: 5}": "tune.seed=5: one of seeds, whose runs are reported; tune with a seed that is not",
    "experiment.tune={steps: 0}": "tune.steps: got 0, input should be greater than 0",
    "experiment.tune=3": "tune: got 3",
    "experiment.base=none.yaml": "none.yaml: No such file",
    "model.pattern=g": "does not reach variant hybrid, which sets model.pattern itself",
    "train.optimizer.lr=1": "does not reach variant wide, which sets train.optimizer itself",
}


@pytest.mark.parametrize(("override", "named"), BAD_OVERRIDES.items(), ids=BAD_OVERRIDES)
def test_bad_overrides_are_one_line(path: Path, override: str, named: str):
    with pytest.raises(ValueError) as caught:
        load_experiment(path, [override])
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rates_that_a_factor_puts_out_of_bounds_are_one_line(path: Path):
    with pytest.raises(ValueError) as caught:
        load_experiment(
            path, ["experiment.tune={lr_factors: [1, 10]}", "experiment.overrides=[train.optimizer.lr=1e38]"]
        )
    assert "variant plain: tune.lr_factors: 10: train.optimizer.lr: got 1e+39" in str(caught.value)


def test_all_rates_are_scaled_in_proportion(path: Path):
    optimizer = "train.optimizer={type: muon_adamw, matrix: {lr: 0.02}, rest: {lr: 0.001, head_lr: 0.004}}"
    recipe = parse_recipe(BASE, ["model.tie_embeddings=false", optimizer])
    assert scale_rates(recipe, 1) == recipe
    scaled = scale_rates(recipe, 0.5).train
    assert (scaled.optimizer.matrix.lr, scaled.optimizer.rest.lr, scaled.optimizer.rest.head_lr) == (0.01, 5e-4, 2e-3)
    assert scaled.model_copy(update={"optimizer": recipe.train.optimizer}) == recipe.train


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "at the top level"),
        ("name: [", "YAML line 1"),
        ("name: a\nvariants: {x: []}", "base: required"),
        ("name: a b\nbase: recipes/base.yaml\nvariants: {x: []}", "name: got 'a b'"),
        ("name: a\nbase: recipes/base.yaml\nvariants: {x: []}\nseed: 1", "did you mean 'seeds'"),
        ("name: a\nbase: recipes/base.yaml\nvariants: {x: 3}", "variants.x: got 3"),
        ("name: a\nbase: .\nvariants: {x: []}", "Is a directory"),
        ("name: a\nbase: trial.yaml\nvariants: {x: []}", "variant x of"),
    ],
)
def test_bad_files_are_one_line(path: Path, text: str, named: str):
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_experiment(path)
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_path_of_a_base_is_printable(path: Path):
    path.write_text('name: a\nbase: "\\e[31m\\u202e.yaml"\nvariants: {x: []}')
    with pytest.raises(ValueError, match="No such file") as caught:
        load_experiment(path)
    assert "\\x1b[31m\\u202e.yaml" in str(caught.value) and str(caught.value).isprintable()


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"experiment .*none\.yaml: No such file"):
        load_experiment(tmp_path / "none.yaml")
