"""Upper bounds of numbers, names of folders, and a plan of the largest recipe."""

import itertools
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
from pydantic import AfterValidator

from fusedlm.config import Recipe, dump_recipe, parse_recipe
from fusedlm.config.experiment import MAX_SEEDS, Experiment, load_experiment
from fusedlm.config.keys import members
from fusedlm.config.model import _check_block_name
from tests.config.test_recipe import SMALL


def _sections(root, found=None):
    found = {} if found is None else found
    if root not in found:
        found[root] = None
        for field in root.model_fields.values():
            for member in members(field.annotation):
                _sections(member, found)
    return list(found)


def _constraints(annotation, metadata):
    """(type, whether it is bounded) of the numbers, texts, lists and mappings in an annotation, at any depth."""
    flat = [inner for one in metadata for inner in (getattr(one, "metadata", None) or [one])]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _constraints(arguments[0], [*metadata, *arguments[1:]])
        return
    if annotation in (int, float):
        yield annotation, any(hasattr(one, "le") or hasattr(one, "lt") for one in flat)
    elif annotation is str or origin in (list, dict):
        short = [one.func for one in flat if isinstance(one, AfterValidator)]
        yield origin or str, any(hasattr(one, "max_length") for one in flat) or _check_block_name in short
    if origin is not Literal:
        for argument in arguments:
            yield from _constraints(argument, metadata if origin in (Union, UnionType) else [])


@pytest.mark.parametrize("section", [*_sections(Recipe), Experiment], ids=lambda one: one.__name__)
def test_every_number_text_and_list_has_an_upper_bound(section):
    for name, field in section.model_fields.items():
        for kind, bounded in _constraints(field.annotation, field.metadata):
            assert bounded, f"{section.__name__}.{name}: {kind.__name__} without an upper bound"


LARGEST = [
    *("train.seed", "train.steps", "train.seq_len", "train.batch_size", "train.micro_batch_size", "train.grad_clip"),
    *("train.max_bad_steps", "train.eval_every", "train.eval_tokens", "train.keep_checkpoints"),
    *("train.optimizer.weight_decay", "train.optimizer.eps", "model.dim", "model.n_layers", "model.norm_eps"),
    "model.logit_softcap",
    *("model.blocks.g.mixer.n_heads", "model.blocks.g.ffn.hidden", "model.blocks.m.mixer.rope_base"),
    *("data.shard_tokens", "data.tokenizer.vocab_size"),
]


@pytest.mark.parametrize("value", ["18446744073709551616", "1" + "0" * 60, "-18446744073709551616"])
@pytest.mark.parametrize("key", LARGEST)
def test_numbers_out_of_range_name_their_key(key: str, value: str):
    with pytest.raises(ValueError, match=f"{key}: got ") as caught:
        parse_recipe(SMALL + "data: {tokenizer: {type: bpe}}\n", [f"{key}={value}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["1e20", "1e300", "1e999", ".inf", ".nan"])
def test_floats_are_no_integers(value: str):
    with pytest.raises(ValueError, match="model.dim: got "):
        parse_recipe(SMALL, [f"model.dim={value}"])


def test_tokens_per_step_and_pass_are_bounded():
    with pytest.raises(ValueError, match="batch_size=16777216, seq_len=1024: a step has at most 268435456 tokens"):
        parse_recipe(SMALL, ["train.batch_size=16777216", "train.seq_len=1024"])
    large = ["train.batch_size=262144", "train.seq_len=1024"]
    with pytest.raises(ValueError, match="a forward pass has at most 16777216 tokens; set a lower micro_batch_size"):
        parse_recipe(SMALL, large)
    assert parse_recipe(SMALL, [*large, "train.micro_batch_size=16384"]).train.batch_size == 262144


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("seeds", "1000000000", f"seeds: got 1000000000, a number of seeds must be at most {MAX_SEEDS}"),
        ("seeds", "[18446744073709551616]", "seeds.0: got 18446744073709551616"),
        ("seeds", "[1.5]", "seeds.0: got 1.5"),
        ("decode_lengths", "[1, 100000000000]", "decode_lengths.1: got 100000000000"),
        ("calibration_steps", "1000000000000", "calibration_steps: got 1000000000000"),
        ("tolerance", "1e300", "tolerance: got 1e+300"),
        ("name", "..", "name: got '..'"),
        ("name", "n" * 61, "at most 60 characters"),
        ("variants", "{..: []}", "variants...: got '..', must be letters"),
        ("variants", "{.x: []}", "got '.x', must be letters"),
        ("variants", "{a/b: []}", "got 'a/b', must be letters"),
        ("variants", '{"a\\n": []}', "got 'a\\n', must be letters"),
        ("variants", '{"": []}', "variants"),
        ("variants", "{" + "v" * 61 + ": []}", "at most 60 characters"),
        ("variants", "{x: [], X: []}", "variants: ['x', 'X'] differ in case only"),
    ],
)
def test_experiments_are_bounded(key: str, value: str, named: str, tmp_path: Path):
    (tmp_path / "base.yaml").write_text(SMALL)
    (tmp_path / "e.yaml").write_text("name: e\nbase: base.yaml\nvariants: {a: []}\n")
    with pytest.raises(ValueError) as caught:
        load_experiment(tmp_path / "e.yaml", [f"experiment.{key}={value}"])
    assert named in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", [".", "..", ".hidden", "a/b", "/etc", "a b", "", "a\n", "a\0", "é", "x" * 201, "~"])
def test_names_that_leave_their_place_are_refused(name: str):
    with pytest.raises(ValueError, match="name: got ") as caught:
        parse_recipe(SMALL, [f"name={name}"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a..b", "-x", "_x", "gpt-350m", "A.1", "x" * 200])
def test_names_that_stay_in_their_place(name: str):
    assert parse_recipe(SMALL, [f"name={name}"]).name == name


@pytest.mark.parametrize("name", ["", "ab", ".", "/", " ", "\n", "\x1b", "\u202e", "🙂", "'"])
def test_names_of_blocks_are_one_letter_or_digit(name: str):
    quoted = '"' + "".join(f"\\U{ord(c):08x}" for c in name) + '"'
    block = "{mixer: {type: gdn, n_heads: 2}, ffn: {type: relu2}}"
    with pytest.raises(ValueError, match="the name of a block is one letter or digit") as caught:
        parse_recipe(SMALL, [f"model.blocks={{{quoted}: {block}}}"])
    assert str(caught.value).isprintable()
    assert parse_recipe(SMALL, [f"model.blocks={{é: {block}, '1': {block}}}", "model.pattern=é1"]).model.pattern == "é1"


def test_the_largest_recipe_is_read_back():
    block = "{mixer: {type: cmd_mla, n_heads: 16384, kv_rank: 1048576, head_dim: 65536}, ffn: {type: routed}}"
    letters = [chr(ord("a") + i) for i in range(26)] + [chr(ord("A") + i) for i in range(26)] + list("0123456789éß")
    text = "\u202e" * 10_000
    recipe = parse_recipe(
        SMALL,
        [
            "model.blocks={" + ", ".join(f"'{letter}': {block}" for letter in letters) + "}",
            f"model.pattern={''.join(letters) * 16}",
            *(f"description={text}", f"sample_prompt={text}", "data.source={type: text, path: x}"),
            *(f"data.source.path={text[:4096]}", f"data.source.separator={text}"),
            "data.validation={type: jsonl, path: x}",
            *(f"data.validation.path={text[:4096]}", f"data.validation.field={text}"),
            *("data.tokenizer={type: file, path: x}", f"data.tokenizer.end_of_text={text}", f"data.dir={text[:4096]}"),
            *(f"runtime.backends.{text[:97]}{i}={text[:100]}" for i in range(100)),
        ],
    )
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([f"description={'x' * 10_001}"], "description: got .* at most 10000 characters"),
        ([f"model.blocks.{chr(0x4E00 + i)}.ffn={{type: relu2}}" for i in range(65)], "model.blocks"),
        ([f"runtime.backends.x{i}=y" for i in range(101)], "runtime.backends: .* at most 100 items"),
        ([f"data.dir={'x' * 4097}"], "data.dir: got .* at most 4096 characters"),
        ([f"model.pattern={'g' * 1025}"], "model.pattern: got .* at most 1024 characters"),
        (["train.loggers=[" + "wandb, " * 11 + "]"], "train.loggers"),
    ],
)
def test_text_and_lists_are_bounded(overrides: list[str], named: str):
    with pytest.raises(ValueError, match=named) as caught:
        parse_recipe(SMALL, overrides)
    assert len(str(caught.value)) < 400


def test_a_model_larger_than_the_memory_is_refused():
    from fusedlm.model import build_model

    for override in ("model.dim=1048576", "model.n_layers=1024"):
        model = parse_recipe(SMALL, ["model.dim=65536", override]).model
        with pytest.raises(ValueError, match="GiB of weights do not fit .* of memory; lower model.dim") as caught:
            build_model(model, vocab_size=257)
        assert "\n" not in str(caught.value)


MIXERS = [
    "{type: attention, n_heads: 16384, head_dim: 65536}",
    "{type: cmd_mla, n_heads: 16384, head_dim: 65536, kv_rank: 1048576, q_rank: 1048576, rope_dim: 65536}",
    "{type: gdn, n_heads: 16384, head_dim: 65536, value_head_dim: 65536, conv_size: 1024}",
    "{type: sdla, n_heads: 16384, head_dim: 65536, rank: 1048576, rope_dim: 65536}",
    "{type: mamba2, n_heads: 16384, head_dim: 65536, state_dim: 65536, n_groups: 16384, conv_size: 1024}",
]


def test_the_largest_recipe_has_a_plan():
    from fusedlm.cli.plan import make_plan

    blocks = {str(i): f"{{mixer: {mixer}, ffn: {{type: swiglu, hidden: 4194304}}}}" for i, mixer in enumerate(MIXERS)}
    tree = ", ".join(f"'{name}': {block}" for name, block in blocks.items())
    recipe = parse_recipe(
        SMALL,
        [
            f"model.blocks={{{tree}}}",
            *("model.pattern=01234", "model.dim=1048576", "model.n_layers=64", "model.vocab_multiple=65536"),
            *("data.tokenizer={type: bpe, vocab_size: 16777216}", "train.steps=1000000000", "train.seq_len=16777216"),
            *("train.batch_size=16", "train.micro_batch_size=1", "train.seed=9223372036854775807"),
        ],
    )
    plan = make_plan(recipe)  # on the meta device: nothing is allocated
    assert plan["parameters"] > 2**50 and plan["tokens"] == 10**9 * 2**28
    finite = [value for value in plan.values() if isinstance(value, int | float) and not isinstance(value, bool)]
    assert all(0 <= value < float("inf") for value in itertools.chain(finite, plan["state_bytes"].values()))
