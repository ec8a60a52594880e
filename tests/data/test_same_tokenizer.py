"""Tokenizers with the same content."""

import json

import pytest

from fusedlm.data.same_tokenizer import tokenizer_difference
from fusedlm.data.tokenizer import ByteTokenizer, SubwordTokenizer, train_bpe

TEXT = ["the union of these states, the union of those states"] * 3


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXT, 280)


def changed(tokenizer, change, indent=None, end_of_text=None):
    spec = json.loads(tokenizer.files()["tokenizer.json"])
    change(spec)
    return SubwordTokenizer(json.dumps(spec, indent=indent, ensure_ascii=False), end_of_text or tokenizer.end_of_text)


def test_the_same_content_in_another_file(bpe):
    def unimportant(spec):
        spec["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
        spec["decoder"], spec["model"] = spec.pop("decoder"), spec.pop("model")

    other = changed(bpe, unimportant, indent=3)
    assert other.fingerprint != bpe.fingerprint and tokenizer_difference(bpe, other) is None
    assert tokenizer_difference(bpe, bpe) is None and tokenizer_difference(ByteTokenizer(), ByteTokenizer()) is None


def test_what_changes_ids_is_a_difference(bpe):
    def merges(spec):
        spec["model"]["merges"].reverse()

    def normalizer(spec):
        spec["normalizer"] = {"type": "Lowercase"}

    def swapped(spec):
        vocab = spec["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    def pre_tokenizer(spec):
        spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1] | {"use_regex": True}

    cases = {merges: "model", swapped: "model", normalizer: "normalizer", pre_tokenizer: "pre-tokenizer"}
    for change, word in cases.items():
        assert tokenizer_difference(bpe, changed(bpe, change)) == f"another {word}"
    assert "tokens, not" in tokenizer_difference(bpe, train_bpe(TEXT, 270))
    assert "tokens, not 257" in tokenizer_difference(bpe, ByteTokenizer())
    other = changed(bpe, lambda spec: None, end_of_text="a")
    assert tokenizer_difference(bpe, other) == f"end-of-text is {bpe.eot_id}, not {other.eot_id}"
