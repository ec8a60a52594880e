"""What a person is told about the text before training."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from fusedlm.config import Recipe, parse_recipe
from fusedlm.config.data import HashSplit
from fusedlm.data import prepare
from fusedlm.data.split import VALIDATION, split_document
from fusedlm.data.summary import summarise, text_facts

RECIPE = """
name: small
model: {dim: 16, n_layers: 1, pattern: a, blocks: {a: {mixer: {type: attention, n_heads: 2}, ffn: {type: relu2}}}}
train: {steps: 10, seq_len: 8, batch_size: 4}
"""


def recipe(folder: Path, *overrides: str) -> Recipe:
    return parse_recipe(RECIPE, [f"data.source={{type: text, path: {folder}}}", f"data.dir={folder}.out", *overrides])


def test_a_split_that_is_far_from_its_fraction_is_told(tmp_path):
    """Two files, the larger one of which the hash holds out."""
    folder = tmp_path / "text"
    folder.mkdir()
    split = HashSplit(fraction=0.05)
    texts = (f"large {i} " * 1000 for i in itertools.count())
    held_out = next(text for text in texts if next(split_document(text, split))[0] == VALIDATION)
    (folder / "large.txt").write_text(held_out)
    (folder / "small.txt").write_text("small " * 10)
    wanted = recipe(folder, "data.split.fraction=0.05")
    prepared = prepare(wanted.data)
    summary = summarise(prepared, wanted)
    assert summary.held_out > 0.9 and summary.wanted == 0.05
    assert summary.held_out == prepared.validation.n_bytes / (prepared.train.n_bytes + prepared.validation.n_bytes)
    fact = text_facts(prepared, wanted)["held-out text"]
    assert "% of the text is held out, where data.split.fraction asks for 5%" in fact and "data.split.type=tail" in fact
    assert "\n" not in fact
    own = recipe(folder, f"data.validation={{type: text, path: {folder / 'large.txt'}}}")
    assert summarise(prepare(own.data), own).split_warning() is None


@pytest.mark.parametrize(
    ("held_out", "wanted", "warned"),
    [(0.05, 0.05, False), (0.09, 0.05, False), (0.11, 0.05, True), (0.02, 0.05, True), (0.8, 0.5, True), (0.7, 0.5, 0)],
)
def test_each_side_is_compared_with_its_share(tmp_path, held_out, wanted, warned):
    (tmp_path / "text.txt").write_text("word " * 100)
    tail = recipe(tmp_path / "text.txt", "data.split={type: tail, fraction: 0.1}")
    summary = summarise(prepare(tail.data), tail)
    assert summary.split_warning() is None
    summary = dataclasses.replace(summary, held_out=held_out, wanted=wanted)
    assert bool(summary.split_warning()) == bool(warned)


def test_epochs_are_counted_and_many_are_told(tmp_path):
    (tmp_path / "text.txt").write_text("word " * 100)
    few = recipe(tmp_path / "text.txt", "data.split={type: tail, fraction: 0.1}")
    prepared = prepare(few.data)
    assert prepared.train.n_tokens == 451
    assert summarise(prepared, few).epochs == 10 * 8 * 4 / 451
    facts = text_facts(prepared, few)
    assert facts["training text"] == "1 document, 450 bytes, 451 tokens"
    assert facts["held-out text"] == "1 document, 50 bytes, 51 tokens, 10% of the bytes"
    assert facts["epochs"] == "0.71"
    many = recipe(tmp_path / "text.txt", "data.split={type: tail, fraction: 0.1}", "train.steps=1000")
    assert text_facts(prepared, many)["epochs"].startswith("71 (warning: every token is read 71 times; past 4,")
