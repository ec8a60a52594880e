"""Matched quantities are equal within the tolerance, and impossible matches are one-line errors."""

from pathlib import Path

import pytest

from fusedlm.compare.matching import account, match_variants
from fusedlm.config import parse_recipe
from fusedlm.config.experiment import Experiment, load_experiment
from fusedlm.model import build_model

RECIPES = Path(__file__).parents[2] / "recipes"
BASE = """
name: base
model:
  dim: 64
  n_layers: 4
  pattern: a
  blocks:
    a: {mixer: {type: attention, n_heads: 4}, ffn: {type: swiglu}}
    g: {mixer: {type: gdn, n_heads: 4}, ffn: {type: relu2}}
    m: {mixer: {type: mla, n_heads: 4, kv_rank: 16, rope_dim: 8}, ffn: {type: swiglu, hidden: 100}}
train: {steps: 100, seq_len: 32, batch_size: 4}
"""
VOCAB = 300


def match(*variants: list[str], step_seconds=None, **settings):
    """The variants v0, v1, ... of the base, matched."""
    recipes = {f"v{i}": parse_recipe(BASE, overrides) for i, overrides in enumerate(variants)}
    experiment = Experiment(name="x", base="x.yaml", variants={name: [] for name in recipes}, **settings)
    return match_variants(experiment, recipes, dict.fromkeys(recipes, VOCAB), step_seconds)


HYBRID, LATENT = ["model.pattern=ga"], ["model.pattern=m"]


@pytest.mark.parametrize("by", ["ffn", "width", "depth"])
@pytest.mark.parametrize("what", ["params", "flops"])
def test_sizes_meet_those_of_the_first(what, by):
    tolerance = 0.01 if by == "ffn" else 0.1  # widths and depths are coarse
    first, *others = match([], HYBRID, LATENT, match=what, match_by=by, tolerance=tolerance).values()
    assert first.changes == () and first.deviation == 0
    for variant in others:
        built = build_model(variant.recipe.model, vocab_size=VOCAB)
        assert variant.account.parameters == sum(p.numel() for p in built.parameters())
        assert variant.account == account(variant.recipe, VOCAB)
        key = "parameters" if what == "params" else "flops_per_token"
        assert getattr(variant.account, key) == pytest.approx(getattr(first.account, key), rel=tolerance)
        assert variant.deviation == pytest.approx(getattr(variant.account, key) / getattr(first.account, key) - 1)
        assert abs(variant.deviation) <= tolerance


def test_the_stated_changes_are_all_changes():
    _, hybrid, latent = match([], HYBRID, LATENT, match="params").values()
    keys = {change.key for change in hybrid.changes}
    assert keys == {"model.blocks.g.ffn.hidden", "model.blocks.a.ffn.hidden"}
    before = {change.key[13]: change.before for change in hybrid.changes}
    assert before == {"a": 192, "g": 256}  # 8/3 of 64 up to a multiple of 64, and 4 * 64
    model = parse_recipe(BASE, HYBRID).model
    for change in hybrid.changes:
        letter = change.key[13]
        assert hybrid.recipe.model.blocks[letter].ffn.hidden == change.after
        ffn = model.blocks[letter].ffn.model_copy(update={"hidden": change.after})
        model = model.model_copy(
            update={"blocks": model.blocks | {letter: model.blocks[letter].model_copy(update={"ffn": ffn})}}
        )
    assert hybrid.recipe.model == model
    assert [str(change) for change in latent.changes] == [f"model.blocks.m.ffn.hidden 100 → {latent.changes[0].after}"]
    ratio = {change.key[13]: change.after / change.before for change in hybrid.changes}
    assert ratio["a"] == pytest.approx(ratio["g"], rel=0.05)


def test_an_equal_variant_is_not_changed():
    _, same = match([], ["train.optimizer.lr=0.1"], match="params").values()
    assert same.changes == () and same.deviation == 0


def test_widths_are_multiples_of_eight_where_those_meet_the_target():
    _, wide = match([], ["model.blocks.a.ffn.hidden=1000"], match="params").values()
    assert wide.recipe.model.blocks["a"].ffn.hidden == 192


def test_a_routed_feed_forward_is_matched_by_its_full_width():
    overrides = ["model.blocks.a.ffn={type: routed, light: 0.25}"]
    first, routed = match([], overrides, match="params").values()
    assert routed.account.parameters == pytest.approx(first.account.parameters, rel=0.01)
    assert routed.changes[0].before == 192 > routed.changes[0].after


def test_an_impossible_match_names_the_nearest():
    with pytest.raises(ValueError, match=r"^variant v1: .* parameters of v0 cannot be met") as caught:
        match(["model.n_layers=1"], ["model.n_layers=8"], match="params")
    text = str(caught.value)
    assert "the nearest is" in text and "model.blocks.a.ffn.hidden=2;" in text and "%" in text and "\n" not in text
    assert "experiment.match_by=width or depth" in text
    alone = [f"model.blocks.{name}.ffn={{type: none}}" for name in "ga"]
    with pytest.raises(ValueError, match="experiment.match_by=ffn: the model has no feed-forwards; use width or depth"):
        match([], ["model.n_layers=3", *alone], match="params")
    with pytest.raises(ValueError, match="model.n_layers=5; try experiment.match_by=ffn or width"):
        match(["model.dim=72"], [], match="params", match_by="depth")


def test_matching_tokens_sets_the_steps():
    first, longer, more = match([], ["train.seq_len=64"], ["train.batch_size=5"], match="tokens").values()
    assert (longer.recipe.train.steps, more.recipe.train.steps) == (50, 80)
    assert first.tokens == longer.tokens == more.tokens == 100 * 32 * 4
    assert str(longer.changes[0]) == "train.steps 100 → 50"
    with pytest.raises(ValueError, match=r"training tokens of v0 need 0.50 steps; 1 are off by \+100.0%"):
        match(["train.steps=1"], ["train.seq_len=64"], match="tokens")


def test_matching_time_sets_the_steps_by_step_time():
    seconds = {"v0": 0.1, "v1": 0.25, "v2": 0.05}
    first, slow, fast = match([], HYBRID, LATENT, match="time", step_seconds=seconds).values()
    assert [v.recipe.train.steps for v in (first, slow, fast)] == [100, 40, 200]
    assert slow.recipe.model == parse_recipe(BASE, HYBRID).model
    assert match([], HYBRID, match="time")["v1"].recipe.train.steps == 100  # not timed yet


def test_matching_none_changes_nothing():
    for variant in match([], HYBRID, LATENT, match="none").values():
        assert variant.changes == () and variant.deviation is None


@pytest.mark.parametrize("path", sorted((RECIPES / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_matched(path: Path):
    experiment, recipes = load_experiment(path)
    assert experiment.name == path.stem
    variants = match_variants(experiment, recipes, dict.fromkeys(recipes, 2048))
    assert all(abs(variant.deviation or 0) <= 0.01 for variant in variants.values())
