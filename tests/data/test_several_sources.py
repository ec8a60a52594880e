"""Preparation of several sources: one folder, one tokenizer, each source with shards of its own."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fusedlm.config.data import (
    BPETokenizerConfig,
    BytesTokenizerConfig,
    DataConfig,
    HashSplit,
    MixedSource,
    Stage,
    TextSource,
)
from fusedlm.data import open_prepared, preparation, prepare
from fusedlm.data.corpus import Corpus
from fusedlm.data.manifest import DamagedData, write_manifest
from fusedlm.data.preparation import tokenizer_weights
from fusedlm.data.split import VALIDATION, split_document

N = {"web": 60, "math": 20, "code": 30}


def document(name: str, i: int) -> str:
    return f"{name} {i} " + f"{name}word " * (i % 7 + 1)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, n in N.items():
        (tmp_path / f"{name}.txt").write_text("\n--\n".join(document(name, i) for i in range(n)))
    return tmp_path


def config(folder: Path, order=("web", "math", "code"), weights=None, **settings) -> DataConfig:
    texts = {name: TextSource(path=str(folder / f"{name}.txt"), separator="--") for name in order}
    sources = {name: MixedSource(source=text, weight=(weights or {}).get(name)) for name, text in texts.items()}
    defaults = {"source": None, "sources": sources, "split": HashSplit(fraction=0.2), "dir": str(folder / "prepared")}
    return DataConfig(**(defaults | settings))


def texts(shards, tokenizer) -> list[str]:
    return [tokenizer.decode(tokens[1:]) for tokens, _ in shards.documents()]


def test_each_source_has_its_documents_in_shards_of_its_own(folder):
    prepared = prepare(config(folder, shard_tokens=400))
    assert prepared.directory.name.startswith("code-math-web-")
    for split in (prepared.train, prepared.validation):
        assert list(split.sources) == ["code", "math", "web"]
        assert [id(s) for part in split.sources.values() for s in part.shards] == [id(s) for s in split.shards]
    for name, n in N.items():
        splits = (prepared.train, prepared.validation)
        train, held_out = (texts(split.sources[name], prepared.tokenizer) for split in splits)
        expected = [document(name, i) for i in range(n)]
        assert sorted(train + held_out) == sorted(expected) and train == [text for text in expected if text in train]
    assert len(prepared.train.sources["web"].shards) > 1
    assert sorted(texts(prepared.train, prepared.tokenizer)) == sorted(
        text for part in prepared.train.sources.values() for text in texts(part, prepared.tokenizer)
    )


def test_the_first_held_out_documents_are_of_every_source(folder):
    prepared = prepare(config(folder))
    validation = prepared.validation
    read, total = Counter(), 0
    for tokens, _ in validation.documents():
        read[prepared.tokenizer.decode(tokens[1:]).split()[0]] += len(tokens)
        total += len(tokens)
        longest = validation.longest + 1
        for name, part in validation.sources.items():
            assert abs(read[name] - total * part.n_tokens / validation.n_tokens) <= 2 * longest
    assert total == validation.n_tokens


def test_the_folder_depends_on_names_and_text_but_not_on_order_or_weights(folder):
    first = prepare(config(folder)).directory
    assert prepare(config(folder, order=("code", "web", "math"))).directory == first
    assert prepare(config(folder, weights={"web": 9.0})).directory == first
    stages = [Stage(until=0.5, weights={"web": 1.0, "math": 1.0}), Stage(weights={"code": 1.0})]
    assert prepare(config(folder, stages=stages, packing="best_fit")).directory == first
    assert prepare(config(folder, order=("web", "math"))).directory != first
    (folder / "math.txt").write_text("other\n--\n" + "words " * 5)
    assert prepare(config(folder)).directory != first


def test_weights_are_part_of_the_text_that_trains_a_tokenizer(folder):
    settings = {"tokenizer": BPETokenizerConfig(vocab_size=300)}
    even = prepare(config(folder, **settings))
    other = prepare(config(folder, weights={"web": 1e-3, "math": 1e-3, "code": 5.0}, **settings))
    assert even.directory != other.directory and even.tokenizer.fingerprint != other.tokenizer.fingerprint
    # A word of the source with the weight takes fewer tokens, those of the others more.
    for name, sign in (("code", -1), ("web", 1)):
        sizes = [len(one.tokenizer.encode(f" {name}word")) for one in (even, other)]
        assert (sizes[1] - sizes[0]) * sign >= 0
    assert len(other.tokenizer.encode(" webword")) > len(even.tokenizer.encode(" webword"))


@pytest.mark.parametrize("weights", [{"web": 6.0, "math": 1.5, "code": 2.5}, {"web": 0.01, "math": 9.0, "code": 0.99}])
def test_the_text_that_trains_a_tokenizer_has_the_shares_of_the_recipe(folder, weights):
    settings = config(folder, weights=weights)
    corpus = Corpus(settings, lambda *_: None)
    found = Counter()
    for text in preparation._weighted_training_text(settings, corpus.parts):
        found[text.split()[0]] += len(text.encode())
    available = sum(len(part.text.encode()) for part in corpus.parts("") if part.split == "train")
    for name, weight in weights.items():
        assert abs(found[name] / available - weight / sum(weights.values())) < 0.02


def test_a_tokenizer_is_trained_on_the_mean_of_the_stages(folder):
    stages = [Stage(until=0.9, weights={"web": 3.0, "math": 1.0}), Stage(weights={"code": 5.0, "web": 5.0})]
    assert tokenizer_weights(config(folder, stages=stages)) == {"code": 0.25, "math": 0.125, "web": 0.625}


def test_a_validation_source_is_removed_from_every_source(folder):
    held_out = folder / "held_out.txt"
    held_out.write_text(f"{document('web', 3)}\n--\nnew\n--\n{document('code', 5)}")
    prepared = prepare(config(folder, validation=TextSource(path=str(held_out), separator="--")))
    assert texts(prepared.validation, prepared.tokenizer) == [document("web", 3), "new", document("code", 5)]
    assert not prepared.validation.sources
    train = texts(prepared.train, prepared.tokenizer)
    assert len(train) == sum(N.values()) - 2 and document("web", 3) not in train and document("code", 5) not in train
    assert prepared.manifest["dropped"]["copies_of_held_out"] == 2


def test_a_source_without_text_is_named(folder):
    (folder / "math.txt").write_text("  ")
    with pytest.raises(ValueError, match="math.txt: no text in 1 file"):
        prepare(config(folder))
    (folder / "math.txt").write_text(next(document("web", i) for i in range(60) if held_out(document("web", i))))
    with pytest.raises(ValueError, match="math.txt: split hash with fraction 0.2 leaves nothing to train on of 1 doc"):
        prepare(config(folder))


def held_out(text: str) -> bool:
    return next(split_document(text, HashSplit(fraction=0.2)))[0] == VALIDATION


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda sources: sources[0].update(train=5), "its sources do not have the 3 shards of train"),
        (lambda sources: sources[2].update(validation=0), "its sources do not have the 3 shards of validation"),
        (lambda sources: sources[0].update(name="web"), "two sources have one name"),
        (lambda sources: sources[0].update(train=-1), "sources.0.train"),
        (lambda sources: sources[0].update(name="../x"), "sources.0.name"),
    ],
)
def test_a_manifest_whose_sources_contradict_its_shards_is_refused(folder, change, what):
    directory = prepare(config(folder, tokenizer=BytesTokenizerConfig())).directory
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest["sources"])
    files = {name: entry["sha256"] for name, entry in manifest.pop("files").items()}
    write_manifest(directory, manifest, files)
    with pytest.raises(DamagedData, match=what):
        open_prepared(directory)
