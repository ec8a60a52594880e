"""YAML: the values of scalars, aliases by value, merge keys, and refusing what is hostile."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusedlm.config import load_recipe, parse_recipe
from fusedlm.config.experiment import load_experiment
from fusedlm.config.reading import MAX_DEPTH, MAX_TEXT, MAX_VALUES, parse_yaml, read_text
from tests.config.test_recipe import SMALL

SCALARS = {
    "": None,
    "~": None,
    "null": None,
    "true": True,
    "FALSE": False,
    "0": 0,
    "-0": 0,
    "+7": 7,
    "0x1F": 31,
    "3e-4": 3e-4,
    "-.5": -0.5,
    "1.": 1.0,
    "01.5": 1.5,
    "1E+3": 1000.0,
    ".inf": float("inf"),
    "-.INF": float("-inf"),
    "y": "y",
    "n": "n",
    "2024-01-31": "2024-01-31",
    "=": "=",
    "10:75": "10:75",
    "a_1": "a_1",
    "tRue": "tRue",
    "1e": "1e",
    "'010'": "010",
    '"1:30"': "1:30",
    "!!str 010": "010",
    "!!str ": "",
    "!!float 1": 1.0,
    "!!int 12": 12,
    "!!null ": None,
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items(), ids=SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str, value):
    found = parse_yaml(f"[{text}]" if text else "[null]")[0]
    assert found == value and type(found) is type(value)


AMBIGUOUS = [
    *("010", "-010", "00", "08", "0_1", "1_000", "-1_000", "1_", "1_000.5", "1_0.5e+3"),
    *("0b1", "0B11", "0o17", "-0o17", "0x_1F", "-0x1F", "+0x1F", "1:30", "1:30:00", "0:30", "190:20:30.15"),
    *("yes", "Yes", "NO", "on", "ON", "off", "Off"),
]


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_scalars_that_yaml_1_1_reads_otherwise_are_refused(text: str):
    for tree in (text, f"a: {text}", f"a: [1, {text}]", f"{text}: 1"):
        with pytest.raises(ValueError, match="line 1: .* YAML 1.1") as caught:
            parse_yaml(tree)
        assert text in str(caught.value) and "in quotes" in str(caught.value)
    assert parse_yaml(f"a: '{text}'") == {"a": text}


def test_what_to_write_instead_is_named():
    expected = {"010": "write 10,", "1_000": "write 1000,", "yes": "write true, false", "1:30": "'1:30'"}
    for text, instead in expected.items():
        with pytest.raises(ValueError, match=instead):
            parse_yaml(text)


def test_aliases_are_copies():
    tree = parse_yaml("a: &a {x: {y: [1]}}\nb: *a\nc: [*a, *a]\nd: &d text\ne: *d\n")
    tree["b"]["x"]["y"].append(2)
    assert tree == {"a": {"x": {"y": [1]}}, "b": {"x": {"y": [1, 2]}}, "c": [{"x": {"y": [1]}}] * 2} | dict.fromkeys(
        "de", "text"
    )


ALIASED = SMALL.replace(
    "    m: {mixer: {type: mla, n_heads: 2, kv_rank: 16}, ffn: {type: swiglu}}", "    m: *g"
).replace("g: {", "g: &g {")


def test_an_override_of_a_block_leaves_its_alias():
    blocks = parse_recipe(ALIASED, ["model.blocks.m.mixer.n_heads=4"]).model.blocks
    assert (blocks["g"].mixer.n_heads, blocks["m"].mixer.n_heads) == (2, 4)
    blocks = parse_recipe(ALIASED, ["model.blocks.g.mixer.n_heads=4"]).model.blocks
    assert (blocks["g"].mixer.n_heads, blocks["m"].mixer.n_heads) == (4, 2)


def test_merge_keys():
    text = "base: &b {x: 1, y: {z: 2}}\nmore: &m {x: 5, w: 6}\n"
    tree = parse_yaml(text + "a:\n  v: 0\n  <<: *b\n  x: 3\nc: {<<: [*b, *m]}\nd: {<<: [*m, *b], y: 7}\ne: {'<<': 1}\n")
    assert tree["a"] == {"v": 0, "y": {"z": 2}, "x": 3} and list(tree["a"]) == ["v", "y", "x"]
    assert tree["c"] == {"x": 1, "y": {"z": 2}, "w": 6}
    assert tree["d"] == {"x": 5, "w": 6, "y": 7}
    assert tree["e"] == {"<<": 1}
    tree["a"]["y"]["z"] = 9
    assert tree["base"]["y"]["z"] == tree["c"]["y"]["z"] == 2


def test_merged_blocks_and_variants(tmp_path: Path):
    merged = ALIASED.replace("    m: *g", "    m: {<<: *g, ffn: {type: swiglu}}")
    blocks = parse_recipe(merged, ["model.blocks.m.mixer.n_heads=4"]).model.blocks
    assert blocks["m"].ffn.type == "swiglu" and blocks["m"].mixer.type == "gdn"
    assert (blocks["g"].mixer.n_heads, blocks["m"].mixer.n_heads) == (2, 4)
    (tmp_path / "base.yaml").write_text(SMALL)
    (tmp_path / "e.yaml").write_text(
        "name: e\nbase: base.yaml\nvariants:\n  a: &a {train.steps: 3, model.dim: 32}\n  b: {<<: *a, model.dim: 128}\n"
        "  c: *a\n"
    )
    recipes = load_experiment(tmp_path / "e.yaml", ["experiment.variants.c=[model.dim=256]"])[1]
    found = {name: (recipe.train.steps, recipe.model.dim) for name, recipe in recipes.items()}
    assert found == {"a": (3, 32), "b": (3, 128), "c": (10, 256)}


REFUSED = {
    "a: 1\nb: {c: 1, c: 2}": "line 2: key 'c' is given twice",
    "a: &a {x: 1}\nb: {<<: *a, <<: *a}": "line 2: key '<<' is given twice",
    "a: {'x': 1, x: 2}": "'x' is given twice",
    "a: &a [1]\nb: {<<: *a}": "line 1: << merges a mapping",
    "a: {<<: 1}": "<< merges a mapping",
    "a: &a {b: *a}": "line 1: an alias contains itself",
    "a: &a {<<: *a}": "line 1: an alias contains itself",
    "a: 1\nb: !!int ''": "line 2: '' does not fit the tag !!int",
    "!!int ''": "'' does not fit the tag !!int",
    "!!int 010": "'010' does not fit",
    "!!int 1.5": "'1.5' does not fit",
    "!!float x": "'x' does not fit",
    "!!bool maybe": "'maybe' does not fit",
    "!!null x": "'x' does not fit",
    "!!int [1]": "tag '!!int' is not supported",
    "!!str {a: 1}": "tag '!!str' is not supported",
    "!!map x": "tag '!!map' is not supported",
    "!!map [1]": "tag '!!map' is not supported",
    "!!binary aGk=": "tag '!!binary' is not supported",
    "!!timestamp x": "tag '!!timestamp' is not supported",
    "!!set {a}": "tag '!!set' is not supported",
    "!!omap [a: 1]": "tag '!!omap' is not supported",
    "!mine x": "tag '!mine' is not supported",
    "!<tag:fusedlm:ambiguous> x": "x is not the same",
    "!!python/name:os.system ''": "is not supported",
    "%TAG ! tag:x:\n---\n!a b": "tag 'tag:x:a' is not supported",
    "%YAML 3.0\n---\na": "incompatible",
    "a: 1\n---\nb: 1": "another document",
    "true: 1": "key True is not a string",
    "~: 1": "key None is not a string",
    "9" * 5000: "5000 characters is not a number",
    "a: 0" + "1" * 5000: "YAML 1.1",
    "'\\x1b[31m": "unexpected end of stream",
    "*" + "a" * 100_000: "undefined alias",
    "!" + "a" * 100_000 + " x": "is not supported",
}


@pytest.mark.parametrize(("text", "named"), REFUSED.items(), ids=lambda text: text[:30])
def test_refusals_are_one_short_line(text: str, named: str):
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert named in message and message.isprintable() and len(message) < 400


def _bomb(leaf: str, link: str) -> str:
    return "\n".join([f"a0: &a0 {leaf}", *(f"a{i}: &a{i} {link.replace('*', f'*a{i - 1}')}" for i in range(1, 12))])


HOSTILE = {
    "aliases": (_bomb("[x, x, x, x]", "[*, *, *, *, *, *, *, *, *]"), "aliases expand"),
    "merges": (_bomb("{a: 1, b: 1, c: 1}", "{<<: [*, *, *, *, *, *, *, *, *]}"), "aliases expand"),
    "empty aliases": (_bomb("[]", "[*, *, *, *, *, *, *, *, *]"), "aliases expand"),
    "long text": (f"a: &a {'x' * 500_000}\nb: [*a, *a, *a]", "aliases expand"),
    "alias depth": (
        "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, MAX_DEPTH + 5))]),
        "nested too deeply",
    ),
    "flow depth": ("[" * 10_000, "nested too deeply"),
    "block depth": ("- " * 10_000 + "x", "nested too deeply"),
    "key depth": ("? " * 10_000 + "x", "nested too deeply"),
    "values": ("[" + "a," * MAX_VALUES + "a]", f"more than {MAX_VALUES} values"),
    "size": ("#" * (MAX_TEXT + 1), f"more than {MAX_TEXT}"),
}


@pytest.mark.parametrize(("text", "named"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_refused(text: str, named: str):
    with pytest.raises(ValueError, match=named):
        parse_yaml(text)


def test_bombs_are_refused_wherever_yaml_is_read(tmp_path: Path):
    """In a recipe, an override, an experiment, its override and its base, within a fixed amount of memory."""
    bomb = HOSTILE["aliases"][0]
    inline = "{" + bomb.replace("\n", ", ") + "}"
    (tmp_path / "bomb.yaml").write_text(bomb)
    (tmp_path / "good.yaml").write_text(SMALL)
    (tmp_path / "e.yaml").write_text("name: e\nbase: good.yaml\nvariants: {a: []}\n")
    (tmp_path / "f.yaml").write_text("name: f\nbase: bomb.yaml\nvariants: {a: []}\n")
    (tmp_path / "g.yaml").write_text("name: g\nbase: good.yaml\nvariants: {a: ['train=" + inline + "']}\n")
    calls = [
        (load_recipe, "bomb.yaml", []),
        (load_recipe, "good.yaml", [f"train={inline}"]),
        (load_experiment, "bomb.yaml", []),
        (load_experiment, "e.yaml", [f"train={inline}"]),
        (load_experiment, "e.yaml", [f"experiment.seeds={inline}"]),
        (load_experiment, "f.yaml", []),
        (load_experiment, "g.yaml", []),
    ]
    for load, name, overrides in calls:
        with pytest.raises(ValueError, match="aliases expand"):
            load(tmp_path / name, overrides)
    code = f"""
import resource, sys
from fusedlm.config import load_recipe
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_recipe({str(tmp_path / "bomb.yaml")!r})
except ValueError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 100 * 2**20


def test_files_without_an_end_are_not_read(tmp_path: Path):
    for path in ("/dev/zero", tmp_path / "large.yaml"):
        if not Path(path).exists():
            Path(path).write_bytes(b"#" * (MAX_TEXT + 1))
        with pytest.raises(ValueError, match="recipe .*: larger than 1 MiB"):
            read_text("recipe", path)
    with pytest.raises(ValueError, match="NUL|null byte"):
        read_text("recipe", "a\0b")


def test_json_is_yaml():
    tree = {"a": [1, -2.5, 1e-7, True, None, "x: y # z"], "b": {"c": {}, "d": []}}
    assert parse_yaml(json.dumps(tree)) == tree
