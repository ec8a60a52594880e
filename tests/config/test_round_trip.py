"""A recipe that is written and read back is the same, whatever its text; the folder of a run is read that way."""

import random
from pathlib import Path

import pytest
import yaml

from fusedlm.config import Recipe, dump_recipe, parse_recipe
from fusedlm.config.experiment import dump_experiment, load_experiment
from fusedlm.config.overrides import apply_override
from fusedlm.config.reading import parse_yaml
from fusedlm.config.writing import dump_yaml, inline_yaml
from tests.config.test_reading import AMBIGUOUS, SCALARS
from tests.config.test_recipe import SMALL

TRICKY = [
    *AMBIGUOUS,
    *SCALARS,
    *("###", "---", "...", "--- a", "# a", "a # b", "a: b", "a:", ": a", "- a", "-", "? a", "?", "!a", "&a", "*a"),
    *("%a",),
    *("@a", "`a", "|", ">", "|-", "[", "]", "{", "}", "[a]", "{a: b}", ",", "<<", "=", "'", '"', "''", '"a"', "\\"),
    *("\\n",),
    *(" a", "a ", "  ", "\t", "a\tb", "\n", "a\nb", "\na", "a\n", "a\n\n\nb", "a\n b", "\r", "a\r\nb", "\x00", "\x07"),
    *("\x1b[31m", "\x7f", "\x80", "\x85", "a\x85b", "\xa0", "\u2028", "a\u2029b", "\ufeff", "a\ufeffb"),
    *("\ufffe", "\uffff"),
    *("\u202eabc", "\u2066a\u2069", "\u200f", "🙂", "👩‍👩‍👧", "é", "e\u0301", "日本語", "\U0010ffff"),
    "\U0001f600" * 40,
    *("1e5", "1.5e3", "0x", "+", ".", "1.2.3", "1,000", "infinity", "nan", "NaN", "2024-01-01", "12e03"),
    *("-.5", "+.inf", "2001-12-14t21:59:43.10-05:00"),
    *("word " * 60, "x" * 300, "a " * 70 + "\n" + "b " * 70, "  lead " + "w " * 80, "é " * 90, "'" * 130, '" ' * 80),
    "{{ text }} ${HOME} $(date)",
]
ALPHABETS = [
    "ab ",
    "01239._-+:eExobyn",
    " \t\n\r#:-?!&*|>'\"%@`{}[],=<~\\/.a0",
    "\n\r\x85\u2028\u2029 a",
    "\x00\x01\x1b\x7f\x9f\xa0\xad\u061c\u200b\u200e\u202a\u202e\u2066\u2069\ufeff\ufffd\ufffe\uffff a",
    "éß日本語🙂👩\u200d\u0301\U0001f1e9\U0010ffff a",
]


def _texts(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    texts = list(TRICKY)
    while len(texts) < n:
        alphabet = draw.choice(ALPHABETS)
        if draw.random() < 0.2:
            alphabet += chr(draw.randrange(0xD800)) + chr(draw.randrange(0xE000, 0x110000))
        texts.append("".join(draw.choices(alphabet, k=draw.choice([1, 2, 3, 5, 8, 20, 200]))))
    return texts


TEXTS = _texts(500)


def test_recipes_are_read_back_as_they_were_written():
    recipe = parse_recipe(SMALL)
    text = parse_recipe(SMALL, ["data.source={type: text, path: x}", "data.tokenizer={type: file, path: x}"])
    for start in range(0, len(TEXTS), 8):
        a, b, c, d, e, f, g, h = (TEXTS[start : start + 8] * 8)[:8]
        source = text.data.source.model_copy(update={"path": a or "x", "separator": b or None})
        tokenizer = text.data.tokenizer.model_copy(update={"end_of_text": c})
        changed = recipe.model_copy(
            update={
                "description": d,
                "sample_prompt": e,
                "data": recipe.data.model_copy(update={"source": source, "tokenizer": tokenizer, "dir": f or "x"}),
                "runtime": recipe.runtime.model_copy(update={"backends": {a[:100]: b[:100], g[:100]: h[:100]}}),
            }
        )
        if "\0" in a + f:  # no path
            continue
        written = dump_recipe(changed)
        assert parse_recipe(written) == changed, TEXTS[start : start + 8]
        assert dump_recipe(parse_recipe(written)) == written


def test_text_survives_in_every_place_and_is_harmless_in_a_terminal():
    for text in TEXTS:
        for tree in (text, {"a": {text: [text, {text: text}]}}):
            written = dump_yaml(tree)
            assert parse_yaml(written) == tree, text
            assert not set(written) & set("\x00\x1b\x7f\x85\x9b\u061c\u200f\u2028\u202a\u202e\u2066\ufeff"), text
            assert parse_yaml(inline_yaml(tree)) == tree, text


def test_overrides_carry_any_text():
    for text in TEXTS:
        tree = {}
        apply_override(tree, f"sample_prompt={inline_yaml(text)}", Recipe)
        assert tree == {"sample_prompt": text}
        if not text or text[0] not in "'\"":  # as it stands, except for quotes around it
            apply_override(tree, f"sample_prompt={text}", Recipe)
            assert tree == {"sample_prompt": text}


def test_experiments_are_read_back_as_they_were_written(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(SMALL)
    overrides = [f"sample_prompt={text}" for text in TEXTS[:60]]
    tree = {
        "name": "e",
        "description": TEXTS[70],
        "base": str(tmp_path / "base.yaml"),
        "variants": {"list": overrides[:10], "mapping": {"sample_prompt": "\u2028#", "model.dim": 32}},
        "overrides": overrides,
    }
    (tmp_path / "e.yaml").write_text(dump_yaml(tree), encoding="utf-8")
    experiment, recipes = load_experiment(tmp_path / "e.yaml")
    assert recipes["list"].sample_prompt == TEXTS[9] and recipes["mapping"].sample_prompt == "\u2028#"
    (tmp_path / "again.yaml").write_text(dump_experiment(experiment), encoding="utf-8")
    assert load_experiment(tmp_path / "again.yaml") == (experiment, recipes)


@pytest.mark.parametrize("number", [0, -1, 2**62, 0.1, 1e-30, 1e22, 1e16, 123456789.123, 5e-324, 1.7e308])
def test_numbers_survive(number):
    for written in (dump_yaml({"a": number}), inline_yaml({"a": number})):
        found = parse_yaml(written)["a"]
        assert found == number and type(found) is type(number)


def test_other_readers_read_what_is_written():
    """YAML 1.1 and 1.2 agree on it: PyYAML's own loader, of version 1.1, gives the same tree."""
    for text in TEXTS:
        assert yaml.safe_load(dump_yaml({"a": text})) == {"a": text}
