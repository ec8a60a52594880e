"""Tokenizers: exact round trips, end-of-text that no text encodes to, files that are verified."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fusedlm.config.data import SotuSource
from fusedlm.data import load_tokenizer
from fusedlm.data.pretokens import LONGEST, SPLIT, UNLIMITED
from fusedlm.data.sources import open_source
from fusedlm.data.tokenizer import END_OF_TEXT, ByteTokenizer, SubwordTokenizer, read_tokenizer_file, train_bpe

NASTY = [
    "",
    " ",
    "\n\n\n  \t\r\n",
    "plain English, with 12345 digits' and don'ts",
    "a\0b\x01\x7f",
    "\ufeffbyte order mark",
    "combining e\u0301 and \u00e9; right to left \u202eabc; zero\u200bwidth",
    "👩‍👩‍👧‍👦 flags 🇩🇪 and \U0010ffff",
    "日本語テキスト ไทย नमस्ते",
    "\u2028line\u2029paragraph\x85next",
    f"a quoted {END_OF_TEXT} and<|endoftext|><|endoftext|>",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def speeches():
    documents = open_source(SotuSource()).documents()
    return [next(documents).text for _ in range(12)]


@pytest.fixture(scope="module")
def bpe(speeches):
    return train_bpe(speeches, 400)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("bpe")


@pytest.mark.parametrize("text", NASTY)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.eot_id not in ids


def test_batches_equal_single_texts(tokenizer):
    for text, ids in zip(NASTY, tokenizer.encode_batch(NASTY), strict=True):
        assert ids.dtype == np.int64 and ids.tolist() == tokenizer.encode(text)


def test_end_of_text_has_no_bytes(tokenizer):
    ids = [tokenizer.eot_id, *tokenizer.encode("ab"), tokenizer.eot_id]
    assert tokenizer.decode_bytes(ids) == b"ab" and tokenizer.decode(ids) == "ab"


def test_incomplete_characters_decode_to_the_replacement_character(tokenizer):
    ids = ByteTokenizer().encode("ü")
    assert ByteTokenizer().decode(ids[:1]) == "\ufffd"


def test_vocabulary_sizes():
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eot_id) == (257, 256)
    trained = train_bpe(["ab ab ab"], 257)
    assert (trained.vocab_size, trained.eot_id) == (257, 256)
    assert train_bpe(["ab ab ab"], 5000).vocab_size < 300


def test_training_compresses_its_text(bpe):
    assert (bpe.vocab_size, bpe.eot_id) == (400, 399)
    text = "the people of the United States"
    assert len(bpe.encode(text)) < len(text) / 1.5


def test_training_is_the_same_in_another_process(bpe):
    script = (
        "from fusedlm.config.data import SotuSource\n"
        "from fusedlm.data.sources import open_source\n"
        "from fusedlm.data.tokenizer import train_bpe\n"
        "documents = open_source(SotuSource()).documents()\n"
        "print(train_bpe([next(documents).text for _ in range(12)], 400).fingerprint)"
    )
    environment = os.environ | {
        "RAYON_NUM_THREADS": "1",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert output.stdout.strip() == bpe.fingerprint


def test_long_documents_in_pieces_give_the_tokens_of_the_full_text(bpe, speeches, monkeypatch):
    texts = ["\n".join(speeches[:2]), "a\n" * 500, "a\n\n\nb .\nC '\nd 12\n34\t\nx" * 50, "-" * 5000, "é\n" * 3000]
    texts += [f"{'-' * n}\n{'x' * n}\n{' ' * n}\nA{' ' * n}.\nB" for n in (255, 256, 257, 511, 512, 513)]
    full = [bpe.encode(text) for text in texts]
    monkeypatch.setattr("fusedlm.data.pretokens._PIECE_CHARACTERS", 40)
    monkeypatch.setattr("fusedlm.data.tokenizer._GROUP_CHARACTERS", 100)
    assert [bpe.encode(text) for text in texts] == full
    assert [ids.tolist() for ids in bpe.encode_batch(texts)] == full


def test_pieces_are_cut_only_where_the_tokenizer_also_cuts():
    model = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), (END_OF_TEXT, 0.0), ("a", -1.0), ("a\na", -1.0)], 0))
    tokenizer = SubwordTokenizer(model.to_str(), END_OF_TEXT)
    assert not tokenizer._can_cut
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens([END_OF_TEXT])
    assert SubwordTokenizer(model.to_str(), END_OF_TEXT)._can_cut
    model.add_tokens(["a\nb"])
    assert not SubwordTokenizer(model.to_str(), END_OF_TEXT)._can_cut


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    names = tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    loaded = load_tokenizer(tmp_path)
    for attribute in ("fingerprint", "vocab_size", "eot_id"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
    assert [loaded.encode(text) for text in NASTY] == [tokenizer.encode(text) for text in NASTY]


def test_a_saved_file_is_a_tokenizer_of_the_library(bpe, tmp_path):
    bpe.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("a new year").ids == bpe.encode("a new year")
    assert plain.token_to_id(END_OF_TEXT) == bpe.eot_id


def test_changed_files_are_named(bpe, tmp_path):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer\.json: changed since it was saved"):
        load_tokenizer(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: No such file"):
        load_tokenizer(tmp_path)
    other, number = '{"type": "other", "fingerprint": ""}', '{"type": "subword", "fingerprint": "", "end_of_text": 5}'
    for content in ("", "[]", "{}", other, number, "[" * 99999):
        (tmp_path / "tokenizer.meta.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.meta\.json: damaged"):
            load_tokenizer(tmp_path)


def write_word_tokenizer(path, vocabulary, **changes):
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.write_text(json.dumps(json.loads(model.to_str()) | changes))
    return path


def test_unusable_tokenizer_files_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="No such file"):
        read_tokenizer_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="byte 0 is not UTF-8"):
        read_tokenizer_file(path)
    path.write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        read_tokenizer_file(path)
    write_word_tokenizer(path, {"<unk>": 0, "a": 1})
    with pytest.raises(ValueError, match=r"end-of-text token '<\|endoftext\|>' is not in its vocabulary") as caught:
        read_tokenizer_file(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_vocabulary_covers_the_largest_id(tmp_path):
    path = write_word_tokenizer(tmp_path / "tokenizer.json", {"<unk>": 0, "a": 7, "</s>": 3})
    tokenizer = read_tokenizer_file(path, "</s>")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (8, 3)
    assert tokenizer.encode("a b") == [7, 0]
    assert tokenizer.unused_ids(10).tolist() == [1, 2, 4, 5, 6, 8, 9]
    assert ByteTokenizer().unused_ids(257).tolist() == [] and ByteTokenizer().unused_ids(259).tolist() == [257, 258]


def test_ids_that_are_shared_or_huge_are_refused(tmp_path):
    # The library gives an added token the number of entries as its id.
    path = write_word_tokenizer(tmp_path / "tokenizer.json", {"<unk>": 0, "a": 7, "b": 3})
    spec = json.loads(path.read_text())
    token = {"content": "</s>", "id": 8, "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path.write_text(json.dumps(spec | {"added_tokens": [token]}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokens '(b|</s>)' and .* get the same id 3; number"):
        read_tokenizer_file(path, "</s>")
    write_word_tokenizer(path, {"<unk>": 0, "a": 2**24, "</s>": 1})
    with pytest.raises(ValueError, match="id 16777216 is too large"):
        read_tokenizer_file(path, "</s>")


def test_an_id_that_the_library_renumbers_is_said(tmp_path, caplog):
    path = write_word_tokenizer(tmp_path / "tokenizer.json", {"<unk>": 0, "a": 1})
    token = {"content": "</s>", "id": 40, "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens": [token]}))
    assert read_tokenizer_file(path, "</s>").vocab_size == 3
    assert [record.getMessage() for record in caplog.records] == [
        "the tokenizer's file gives '</s>' the id 40; it is read as 2"
    ]


ORDINARY = [
    "if (x):\n" + " " * 80 + "return -1  # " + "-" * 100 + "\r\n\r\n\n",
    "a\u3000b\t\t\n  \n x\n\n",
    "don't I'LL 12345 \u00fc!?\n\n",
]


def test_the_limit_of_pretokens_changes_nothing_in_ordinary_text(speeches):
    split, unlimited = (pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in (SPLIT, UNLIMITED))
    for text in [*NASTY[:-1], *ORDINARY, *speeches, "x" * LONGEST, " " * LONGEST, "\n" * LONGEST]:
        assert split.pre_tokenize_str(text) == unlimited.pre_tokenize_str(text)


RUNS = {
    "spaces": " ",
    "dashes": "-",
    "line ends": "\n",
    "CJK": "\u6f22\u5b57\u4eee\u540d",
    "DNA": "ACGTTGCAAC",
    "mixed": "\u00fc\u6f22 \n--",
}


@pytest.mark.parametrize("run", RUNS)
def test_pretokens_of_a_run_without_a_break_are_bounded(run):
    text = (RUNS[run] * 20_000)[:20_000] + "end"
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    cut = split.pre_tokenize_str(text)
    assert max(len(piece) for piece, _ in cut) <= 2 * LONGEST + 1
    assert "".join(piece for piece, _ in cut) == text
    trained = train_bpe([text], 300)
    assert trained.decode(trained.encode(text)) == text


def test_a_tokenizer_trained_without_the_limit_loads_and_encodes_as_before(bpe, speeches, tmp_path):
    bpe.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = UNLIMITED
    old = SubwordTokenizer(json.dumps(spec), END_OF_TEXT)
    assert old._can_cut and old.keeps_text
    plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    for text in [*NASTY, "ab" * 2000, " " * 1000 + "x"]:
        assert old.encode(text) == plain.encode(text).ids
    assert old.encode(speeches[0]) == bpe.encode(speeches[0])


def test_padding_and_truncation_of_a_file_are_off(tmp_path):
    model = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.enable_truncation(2)
    model.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    assert read_tokenizer_file(path, "</s>").encode("a a a") == [1, 1, 1]


@pytest.mark.parametrize("special", [True, False])
def test_end_of_text_of_a_file_is_not_parsed_in_text(tmp_path, special):
    model = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_tokens([tokenizers.AddedToken(END_OF_TEXT, special=special, normalized=False)])
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    tokenizer = read_tokenizer_file(path)
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.eot_id == 256 and 256 not in ids and tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
