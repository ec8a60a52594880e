"""Override values by the type of the key, and the right key for a wrong one."""

from pathlib import Path

import pytest

from fusedlm.config import parse_recipe
from fusedlm.config.experiment import load_experiment
from tests.config.test_recipe import SMALL

TEXTS = [
    "###",
    "---",
    "...",
    "corpus #2",
    "a: b",
    "[INST] hello",
    "{a",
    "- x",
    "*.txt",
    "&a",
    "!tag x",
    "%x",
    "@x",
    "`x`",
    "|",
    ">",
    "010",
    "1:30",
    "3",
    "on",
    "true",
    "~",
    "<<",
    "=",
    "a=b",
    " two spaces ",
    "'a' and 'b'",
    '"',
    "'it",
    "\ttab",
    "line\nbreak",
    "\\n",
    "{type: text}",
    "\u202eright-to-left",
    "🙂",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_value_of_a_text_key_is_the_text(text: str, tmp_path: Path):
    overrides = [
        f"sample_prompt={text}",
        f"description={text}",
        f"data.source.path={text}",
        "data.source.type=text",
        f"data.source.separator={text}",
        f"runtime.backends.attention={text}",
    ]
    recipe = parse_recipe(SMALL, overrides)
    found = (recipe.sample_prompt, recipe.description, recipe.data.source.path, recipe.data.source.separator)
    assert set(found) == {text} and recipe.runtime.backends == {"attention": text}
    (tmp_path / "base.yaml").write_text(SMALL)
    (tmp_path / "e.yaml").write_text("name: e\nbase: base.yaml\nvariants: {a: []}\n")
    experiment, recipes = load_experiment(tmp_path / "e.yaml", [f"experiment.description={text}", *overrides[:2]])
    assert experiment.description == recipes["a"].sample_prompt == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("'###'", "###"),
        ('"a\\n#"', "a\n#"),
        ("'it''s'", "it's"),
        ("'null'", "null"),
        ("''''", "'"),
        ("null", None),
        ("Null", "Null"),
        ("'a' # b", "'a' # b"),
        ("'a'x'", "'a'x'"),
        ("\"a' 'b\"", "a' 'b"),
    ],
)
def test_quotes_and_null(value: str, expected):
    recipe = parse_recipe(SMALL, ["data.source={type: text, path: x}", f"data.source.separator={value}"])
    assert recipe.data.source.separator == expected


def test_null_is_text_where_a_key_cannot_be_null():
    recipe = parse_recipe(SMALL, ["sample_prompt=null", "description=", "name='010'"])
    assert (recipe.sample_prompt, recipe.description, recipe.name) == ("null", "", "010")


@pytest.mark.parametrize("override", ["data.source.separator=", "data.source.path=", "data.source.path=a\0b"])
def test_text_that_a_key_does_not_take_is_refused(override: str):
    key = override.split("=")[0]
    with pytest.raises(ValueError, match=f"{key}: got '"):
        parse_recipe(SMALL, ["data.source={type: text, path: x}", override])


def test_structures_are_yaml():
    recipe = parse_recipe(SMALL, ['data.source={type: text, path: "corpus #2", separator: "---"}  # of two'])
    assert (recipe.data.source.path, recipe.data.source.separator) == ("corpus #2", "---")


def test_values_of_a_mapping_of_overrides(tmp_path: Path):
    """Strings of an experiment arrive as they are written, and numbers are not taken for text."""
    (tmp_path / "base.yaml").write_text(SMALL)
    path = tmp_path / "e.yaml"
    texts = ["###", "null", "a\u2028b", "\x85", "\u202e", '"', "'", "\\", "🙂", "\x7f", "\ufeff"]
    for text in texts:
        quoted = '"' + "".join(f"\\U{ord(c):08x}" for c in text) + '"'
        source = f"{{type: text, path: x, separator: {quoted}}}"
        variant = f"{{sample_prompt: {quoted}, data.source: {source}}}"
        path.write_text(f"name: e\nbase: base.yaml\nvariants: {{a: {variant}}}\n")
        recipe = load_experiment(path)[1]["a"]
        assert (recipe.sample_prompt, recipe.data.source.separator) == (text, text)
    for value in ("1e3", "5", "true", "[a]"):
        path.write_text(f"name: e\nbase: base.yaml\nvariants: {{a: {{sample_prompt: {value}}}}}\n")
        with pytest.raises(ValueError, match="variants: sample_prompt: got .*, must be text; put it in quotes"):
            load_experiment(path)


HINTS = {
    "train.lr=1": "train.lr: unknown key; did you mean train.optimizer.lr?",
    "lr=1": "lr: unknown key; did you mean train.optimizer.lr?",
    "optimizer.lr=1": "optimizer: unknown key; did you mean train.optimizer?",
    "batchsize=3": "did you mean train.batch_size?",
    "train.optimizer.lrs=1": "train.optimizer.lrs: unknown key; did you mean 'lr'?",
    "path=x": "did you mean data.source.path, data.sources.NAME.source.path, data.validation.path or "
    "data.tokenizer.path?",
    "model.n_heads=3": "did you mean model.blocks.NAME.mixer.n_heads?",
    "model.hidden=3": "did you mean model.blocks.NAME.ffn.hidden?",
    "blocks.g.mixer.n_heads=3": "blocks: unknown key; did you mean model.blocks?",
    "model.blocks.n_heads=3": "letter or digit; did you mean model.blocks.NAME.mixer.n_heads?",
    "model.blocks.g.n_heads=3": "did you mean model.blocks.NAME.mixer.n_heads?",
    "model.blocks.g.mixer.window=3": "window: unknown key; it is a key of type 'attention'; known here: chunk_size",
    "train.optimizer={type: adamw, nesterov: true}": "nesterov: unknown key; it is a key of type 'sgd'",
    "train.optimizer.momentum=0.5": "type: required, but missing; one of 'adamw', 'sgd', "
    "'muon_adamw', 'normuon_adamw'; momentum: of 'sgd'",
    "train.optimizer={type: muon_adamw, matrix: {beta2: 0.5}}": "train.optimizer.matrix.beta2: unknown key",
    "train.optimizer={type: normuon_adamw, lr: 0.1}": "train.optimizer.lr: unknown key; it is a key of type 'adamw' or",
    "train.optimizer={type: normuon_adamw, matrix: {scheme: svd}}": "train.optimizer.matrix.scheme: got 'svd', input",
    "warmup=1": "did you mean train.schedule.warmup?",
    "type=sgd": "did you mean model.blocks.NAME.mixer.type, model.blocks.NAME.ffn.type, data.source.type or",
    "train.xyzzy=#": "train.xyzzy: unknown key; known: batch_size",
    "\x1b[31m\u202e=1": "\\x1b[31m\\u202e: unknown key",
    "train." + "x" * 10_000 + "=1": "unknown key",
    "a." * 29 + "b=1": "a: unknown key",
    "a." * 10_000 + "b=1": "must have the form",
    "train.steps=" + "9" * 5000: "is not a number",
    "train.steps=" + "9" * 60: "less than or equal to 1000000000",
}


@pytest.mark.parametrize(("override", "named"), HINTS.items(), ids=lambda text: text[:30])
def test_hints(override: str, named: str):
    text = SMALL + "data: {tokenizer: {type: bytes}}\n"
    if "optimizer.momentum" not in override:
        text = text.replace("batch_size: 4", "batch_size: 4, optimizer: {type: adamw}")
    with pytest.raises(ValueError) as caught:
        parse_recipe(text, [override])
    message = str(caught.value)
    assert named in message and message.isprintable() and len(message) < 400
