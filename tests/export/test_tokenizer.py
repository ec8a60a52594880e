"""Tokenizer files: of tokenizers of other programs, which can have rules of their own, and back to the same ids."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fusedlm.data.tokenizer import ByteTokenizer, SubwordTokenizer, train_bpe
from fusedlm.export.tokenizer import restored_tokenizer, tokenizer_files
from tests.export.test_folder import _nasty

transformers = pytest.importorskip("transformers")

TEXTS = ["the cat sat on the mat", "Ünïcödé and CAPITALS", "the the the"] * 3


def _bytes():
    return ByteTokenizer()


def _trained():
    return train_bpe(TEXTS, 280)


def _other(end="</s>", special=True, pretty=False):
    """With a normalizer, a post-processor, truncation, padding and dropout."""
    model = tokenizers.Tokenizer(models.BPE(dropout=0.5))
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    added = [end, "[CLS]"] if special else ["[CLS]"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=added,
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), end],
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    if not special:
        spec = json.loads(model.to_str())
        spec["model"]["vocab"][end] = max(spec["model"]["vocab"].values()) + 1
        model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", model.token_to_id("[CLS]"))]
    )
    model.enable_truncation(4)
    model.enable_padding()
    return SubwordTokenizer(model.to_str(pretty=pretty), end)


MAKERS = {
    "bytes": _bytes,
    "trained": _trained,
    "other": _other,
    "pretty": lambda: _other(pretty=True),
    "end of text is an ordinary token": lambda: _other(special=False),
}


@pytest.mark.parametrize("name", MAKERS)
def test_ids_are_equal_there_and_back(name, tmp_path):
    tokenizer = MAKERS[name]()
    files = tokenizer_files(tokenizer, 64)
    for file, content in files.items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    end = json.loads(files["tokenizer_config.json"])["eos_token"]
    back = restored_tokenizer(files["tokenizer.json"], end, tokenizer.fingerprint)
    assert back.eot_id == tokenizer.eot_id and back.vocab_size == tokenizer.vocab_size
    for text in [*_nasty()[:60], end, f"a{end}b", "[CLS]"]:
        expected = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [tokenizer.eot_id, *expected], repr(text)
        assert back.encode(text) == expected, repr(text)
    assert theirs.model_max_length == 64
    same = isinstance(tokenizer, ByteTokenizer) or name == "trained"
    assert (back.fingerprint == tokenizer.fingerprint) == same
    again = tokenizer_files(back, 64)
    assert again == files


def test_a_changed_tokenizer_is_not_taken_for_the_exported_one():
    tokenizer = train_bpe(TEXTS, 280)
    content = tokenizer_files(tokenizer, 64)["tokenizer.json"]
    for changed, fingerprint in ((content + "\n", tokenizer.fingerprint), (content, None)):
        found = restored_tokenizer(changed, "<|endoftext|>", fingerprint)
        assert found.fingerprint != tokenizer.fingerprint and found.encode("the cat") == tokenizer.encode("the cat")
