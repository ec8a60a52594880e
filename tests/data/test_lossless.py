"""A tokenizer that loses text is refused for held-out text, and named for training text."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fusedlm.config.data import DataConfig, FileTokenizerConfig, TextSource
from fusedlm.data import load_tokenizer, open_prepared, prepare
from fusedlm.data.lossless import change
from fusedlm.data.manifest import write_manifest
from fusedlm.data.tokenizer import END_OF_TEXT, ByteTokenizer, SubwordTokenizer, read_tokenizer_file, train_bpe

ALPHABET = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(normalizer=None, dropout=None, **changes):
    """Byte-level BPE with one merge and 258 ids, as the content of a tokenizer.json."""
    model = tokenizers.Tokenizer(models.BPE(ALPHABET | {"ab": 256}, [("a", "b")], dropout=dropout))
    model.normalizer = normalizer
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([END_OF_TEXT])
    return json.dumps(json.loads(model.to_str()) | changes)


def words(vocabulary=("the", "Union", "<unk>", END_OF_TEXT)):
    model = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model.to_str()


def config(folder: Path, content: str, held_out: str, training: str = "a text\n--\nanother") -> DataConfig:
    for name, text in (("text.txt", training), ("held_out.txt", held_out), ("tokenizer.json", content)):
        (folder / name).write_bytes(text.encode())
    text, validation = (
        TextSource(path=str(folder / f"{name}.txt"), separator="--") for name in ("text", "held_out")
    )
    tokenizer = FileTokenizerConfig(path=str(folder / "tokenizer.json"))
    return DataConfig(source=text, validation=validation, tokenizer=tokenizer, dir=str(folder / "prepared"))


@pytest.mark.parametrize(
    ("content", "held_out", "found"),
    [
        (byte_level(normalizers.Lowercase()), "kept\n--\nthe Union", "2 at byte 4: 'the Union' becomes 'the union'"),
        (byte_level(normalizers.NFKC()), "a \ufb01ne", "1 at byte 2: 'a \ufb01ne' becomes 'a fine'"),
        (byte_level(normalizers.Strip()), "kept\n--\nend \n", "2 at byte 3: 'end ' becomes 'end'"),
        (words(), "the Union\n--\nthe State", "2 at byte 4: 'the State' becomes 'the <unk>'"),
        (words(), "the  Union", "1 at byte 4: 'the  Union' becomes 'the Union'"),
    ],
    ids=["lower-case", "NFKC", "strip", "unknown", "spaces"],
)  # fmt: skip
def test_lost_held_out_text_is_refused_with_document_and_byte(tmp_path, content, held_out, found):
    settings = config(tmp_path, content, held_out)
    with pytest.raises(ValueError) as caught:
        prepare(settings)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/held_out.txt: the tokenizer changes held-out document {found}; ")
    assert message.endswith("use a tokenizer that keeps every byte, such as data.tokenizer.type=bpe or bytes")
    assert not list((tmp_path / "prepared").glob("text-*"))


def test_lost_training_text_is_a_warning(tmp_path, caplog):
    training = "kept\n--\nOne\n--\nTwo"
    prepared = prepare(config(tmp_path, byte_level(normalizers.Lowercase()), "kept too", training))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/text.txt: the tokenizer changes 2 of 3 training documents "
        "(document 2 at byte 0: 'One' becomes 'one'); the model learns the changed text"
    ]
    assert prepared.manifest["tokenizer"]["lossy_training_documents"] == 2


def test_a_normalizer_that_changes_nothing_here_is_not_refused(tmp_path, caplog):
    prepared = prepare(config(tmp_path, byte_level(normalizers.NFC()), "caf\u00e9"))
    assert prepared.validation.n_bytes == 5 and not caplog.records


def test_a_folder_of_an_earlier_version_is_refused_by_its_count(tmp_path):
    directory = prepare(config(tmp_path, byte_level(), "kept")).directory
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    checksums = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    manifest["tokenizer"] |= {"lossless": False, "lossy_validation_documents": 3}
    write_manifest(directory, {k: v for k, v in manifest.items() if k not in ("files", "checksum")}, checksums)
    with pytest.raises(ValueError, match="changes the text of 3 held-out documents; bits per byte would be wrong; use"):
        open_prepared(directory)


def test_every_text_is_kept_only_if_that_is_certain():
    assert ByteTokenizer().keeps_text and train_bpe(["ab ab"], 260).keeps_text
    assert SubwordTokenizer(byte_level(), END_OF_TEXT).keeps_text
    assert not SubwordTokenizer(words(), END_OF_TEXT).keeps_text
    assert not SubwordTokenizer(byte_level(normalizers.NFC()), END_OF_TEXT).keeps_text
    spec = json.loads(byte_level())
    added = spec["added_tokens"]
    fewer = {token: i for token, i in spec["model"]["vocab"].items() if token != "ab"}
    fewer = {"ab" if token == "\u0120" else token: i for token, i in fewer.items()}  # no byte 32
    for changes in (
        {"model": spec["model"] | {"vocab": fewer}},
        {"model": spec["model"] | {"end_of_word_suffix": "ab"}},
        {"decoder": None},
        {"pre_tokenizer": spec["pre_tokenizer"] | {"add_prefix_space": True}},
        {"added_tokens": [*added, added[0] | {"id": 258, "content": "x", "lstrip": True}]},
        {"added_tokens": [*added, added[0] | {"id": 32, "content": "\u0120"}]},
    ):
        assert not SubwordTokenizer(byte_level(**changes), END_OF_TEXT).keeps_text, changes


@pytest.mark.parametrize(
    ("raw", "decoded", "found"),
    [
        (b"", b"", None),
        (b"abc", b"abc", None),
        (b"abc", b"ab", "byte 2: 'abc' becomes 'ab'"),
        (b"ab", b"abc", "byte 2: 'ab' becomes 'abc'"),
        (b"ab", b"", "byte 0: 'ab' becomes ''"),
        (b"x" * 50 + b"Y\nz", b"x" * 50 + b"y\n", rf"byte 50: '{'x' * 24}Y\nz' becomes '{'x' * 24}y\n'"),
        ("\u202eA".encode(), "\u202ea".encode(), r"byte 3: '\u202eA' becomes '\u202ea'"),
    ],
)  # fmt: skip
def test_a_change_is_located_and_shown_in_one_line(raw, decoded, found):
    shown = change(raw, decoded)
    if found is None:
        assert shown is None
    else:
        assert shown == found


def test_dropout_is_switched_off_and_said_once(tmp_path, caplog):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level(dropout=0.37))
    tokenizer = read_tokenizer_file(path)
    tokenizer.save(tmp_path)
    for loaded in (tokenizer, read_tokenizer_file(path), load_tokenizer(tmp_path)):
        assert {tuple(loaded.encode("ab" * 50)) for _ in range(8)} == {(256,) * 50}
        assert loaded.fingerprint == tokenizer.fingerprint
    [record] = caplog.records
    assert record.getMessage().startswith("the tokenizer's dropout of 0.37 is switched off")


def test_decoding_takes_arrays_lists_and_ids_that_no_token_has():
    for tokenizer in (ByteTokenizer(), SubwordTokenizer(byte_level(), END_OF_TEXT)):
        ids = np.array(tokenizer.encode("a\u00fcb"), dtype=np.uint16)
        for form in (ids, ids.tolist(), iter(ids), [*ids, tokenizer.eot_id, 5000]):
            assert tokenizer.decode_bytes(form) == "a\u00fcb".encode()
