"""Damaged recipes, experiments and overrides: a recipe that can be written and read back, or one line."""

import random
from pathlib import Path

import pytest

from fusedlm.config import dump_recipe, parse_recipe
from fusedlm.config.experiment import load_experiment
from tests.config.test_experiment import EXPERIMENT
from tests.config.test_reading import AMBIGUOUS
from tests.config.test_recipe import SMALL

PIECES = [
    *AMBIGUOUS,
    *("!!int ''", "!!float x", "!!binary aGk=", "!!set {a}", "!x", "&a", "*a", "<<: *a", "<<: 1", "- ", "? "),
    *(": ", "#"),
    *("{", "}", "[", "]", ",", "'", '"', "|", ">", "%YAML 1.1", "---", "...", "\n", "\t", "  ", "\r", "\x00"),
    "\x1b[31m",
    *("\u202e", "\u2028", "\ufeff", "\x85", "🙂", "null", "true", "-1", "0", "1e999", ".nan", "-.inf", "9" * 30),
    "9" * 5000,
    *("..", "/", "~", "type", "name", "[" * 60, "{a: " * 60, "x" * 3000),
]


def mutate(text: str, draw: random.Random) -> str:
    """The text with one to four pieces inserted, removed, exchanged, repeated or replaced by others."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice([0, 0, 1, 2, 5, 20]))
        other = draw.randrange(len(text) + 1)
        piece = draw.choice([draw.choice(PIECES), text[other : other + 20], ""])
        text = text[:start] + piece + text[end:]
    return text


def check(load, *arguments):
    """The result, or None after one printable line."""
    try:
        return load(*arguments)
    except ValueError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 1000, message
        return None


@pytest.mark.parametrize("seed", range(4))
def test_damaged_text_is_read_or_refused(seed: int, tmp_path: Path):
    draw = random.Random(seed)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/base.yaml").write_text(SMALL)
    read = 0
    for _ in range(100):
        recipe = check(parse_recipe, mutate(SMALL, draw))
        if recipe is not None:
            assert parse_recipe(dump_recipe(recipe)) == recipe
            read += 1
        path = tmp_path / "e.yaml"
        path.write_text(mutate(EXPERIMENT, draw), encoding="utf-8", newline="")
        check(load_experiment, path)
        override = mutate("model.blocks.g={mixer: {type: gdn, n_heads: 2}, ffn: {type: relu2}}", draw)
        check(parse_recipe, SMALL, [override])
        check(parse_recipe, SMALL, [mutate("train.optimizer.lr=3e-4", draw), mutate("sample_prompt=The ", draw)])
    assert 0 < read < 100
