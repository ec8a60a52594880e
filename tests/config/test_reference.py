"""The reference of keys: complete, in the words of the schema, and as written to docs/recipes.md."""

import pytest

from fusedlm.config import parse_recipe
from fusedlm.config.experiment import Experiment
from fusedlm.config.keys import dotted_keys
from fusedlm.config.recipe import Recipe
from fusedlm.config.reference import REQUIRED, look_up, places, type_text
from scripts.recipe_keys import PAGE, page
from tests.config.test_recipe import SMALL


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/recipes.md is out of date: python scripts/recipe_keys.py"


def test_every_key_and_section_has_a_meaning():
    for place in places():
        for section in place.sections:
            assert section.meaning, f"{place.key} {section.type}: the section has no docstring"
            for key in section.keys:
                assert key.meaning[:1].strip() and key.meaning.endswith("."), f"{place.key}.{key.name}: no sentence"
                assert key.type and key.default, f"{place.key}.{key.name}"


def test_the_reference_has_every_key():
    sections = [(place.key, section) for place in places() for section in place.sections]
    listed = {f"{where}.{key.name}".lstrip(".") for where, section in sections for key in section.keys}
    assert listed == {*dotted_keys(Recipe), *(f"experiment.{key}" for key in dotted_keys(Experiment))}
    text = page()
    assert all(f"| `{key.rpartition('.')[2]}` |" in text for key in listed)


_OPTIONAL = ("model.blocks", "model.yarn", "model.bigram", "model.mup", "model.mtp", "model.logit_rescale")
_OPTIONAL += ("data.validation", "data.sources", "data.pipeline", "train.swa", "train.qat", "train.ramps")
_OPTIONAL += ("train.distill", "train.optimizer.")


def test_defaults_are_those_of_the_schema():
    """Each default that is shown, given as an override, changes nothing."""
    recipe = parse_recipe(SMALL)
    changed = 0
    for place in places():
        if place.key.startswith((*_OPTIONAL, "experiment")) or len(place.sections) > 1:
            continue
        for key in place.sections[0].keys:
            if key.default not in (REQUIRED, "all defaults") and not key.type.startswith("section of"):
                override = f"{place.key}.{key.name}={key.default}".lstrip(".")
                assert parse_recipe(SMALL, [override]) == recipe, override
                changed += 1
    assert changed > 25


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.steps", "integer from 1 to 1,000,000,000"),
        ("train.optimizer.beta1", "number, at least 0, less than 1"),
        ("train.ema", "number, greater than 0, less than 1, or null"),
        ("train.micro_batch_size", "integer from 1 to 16,777,216, or null"),
        ("train.seed", "integer from 0 to 9,223,372,036,854,775,807"),
        ("train.optimizer", "section of type adamw, sgd, muon_adamw, normuon_adamw"),
        ("data.validation", "section of type sotu, text, jsonl, parquet, warc, or null"),
        ("train.loggers", "list, each one of tensorboard, wandb, mlflow, csv"),
        ("runtime.device", "one of auto, cpu, cuda"),
        ("runtime.compile", "true or false"),
        ("runtime.backends", "mapping from text to text"),
        ("data.source.separator", "text, or null"),
        ("data.source.path", "path"),
        ("model.norm_eps", "number from 1e-30 to 1"),
        ("model.blocks", "mapping from letter to section"),
        ("model.blocks.x.mixer.window", "integer from 1 to 16,777,216, or null"),
        ("experiment.overrides", "list, each key=value"),
    ],
)
def test_types_are_words(key: str, expected: str):
    assert look_up(key)[0].key.type == expected


def test_numbers_without_bounds_have_words_too():
    assert (type_text(int), type_text(float), type_text(str)) == ("integer", "number", "text")


def test_a_key_of_several_types_is_shown_for_each():
    assert [found.title for found in look_up("train.optimizer.lr")] == [
        "train.optimizer.lr (type adamw)",
        "train.optimizer.lr (type sgd)",
    ]
    assert [found.title for found in look_up("model.blocks.a.mixer.rope_base")] == ["model.blocks.a.mixer.rope_base"]
    assert [found.section.type for found in look_up("train.optimizer.sgd")] == ["sgd"]
    assert [found.section and found.section.type for found in look_up("train.optimizer")] == [
        None, "adamw", "sgd", "muon_adamw", "normuon_adamw",
    ]  # fmt: skip
    assert [found.title for found in look_up("train.optimizer.matrix.beta2")] == ["train.optimizer.matrix.beta2"]


def test_neutral_keys_say_so():
    assert "when a run is resumed" in look_up("train.eval_every")[0].key.meaning
    assert "when a run is resumed" not in look_up("train.seq_len")[0].key.meaning


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("train.lr", "train.lr: no such key; did you mean train.optimizer.lr?"),
        ("lr", "did you mean train.optimizer.lr?"),
        ("data.path", "did you mean data.source.path, data.sources.NAME.source.path, data.validation.path or"),
        ("train.stepz", "did you mean train.steps?"),
        ("experiment.seed", "did you mean experiment.seeds?"),
        ("experiment.xyz", "known: name, description, base"),
        ("xyz", "known: name, description, model"),
        ("train.optimizer.adam", "no such key; known: type, lr"),
        ("train.steps.x", "no such key"),
        ("..", "no such key"),
        ("\x1b[31m" + "x" * 1000, "\\x1b[31mxxx"),
    ],
)
def test_unknown_keys_are_one_line(key: str, named: str):
    with pytest.raises(ValueError) as caught:
        look_up(key)
    assert named in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400
