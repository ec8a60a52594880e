"""From a recipe's data section to a folder of token shards, named by a fingerprint of settings and text: what is
prepared is not prepared again."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fusedlm.config.data import BPETokenizerConfig, DataConfig, FileTokenizerConfig
from fusedlm.data.lookup import find_prepared
from fusedlm.data.lossless import LossCheck
from fusedlm.data.manifest import FORMAT_VERSION, folder_name, write_manifest
from fusedlm.data.meter import Meter, ReportProgress, silent
from fusedlm.data.shards import PreparedData, ShardWriter, open_prepared
from fusedlm.data.sources import Source, open_source
from fusedlm.data.split import TRAIN, VALIDATION, content_digest, split_document
from fusedlm.data.staging import exclusive, remove_leftovers, staged
from fusedlm.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer_file, train_bpe
from fusedlm.data.vocabulary import check_vocab_size
from fusedlm.files import sha256_file

_BATCH_CHARACTERS = 1 << 22


class ChangedText(ValueError):
    """The source does not hold the requested text."""


def prepare(
    config: DataConfig, progress: ReportProgress | None = None, *, fingerprint: str | None = None
) -> PreparedData:
    """Prepare the data of a recipe, or open what an earlier call prepared.

    The folder is `config.dir`/<source>-<fingerprint>, or any other in `config.dir` whose manifest has the fingerprint.
    The fingerprint covers the settings except `dir` and `document_mask`, and the content of the source's files, not
    their paths; each call therefore reads the source once to hash it (about 1.8 GB/s per core where the processor has
    SHA instructions). The folder appears complete or not at all, and a second preparation at the same time waits for
    the first. Text is streamed: memory holds the largest
    document, a few batches of tokens, and 8 bytes per document of each split; training a BPE tokenizer also counts
    every distinct word.

    Args:
        progress: called as progress(stage, done, total or None) with bytes done; stages are "hashing", "waiting for
            another preparation", "training tokenizer", "tokenizing" and "verifying".
        fingerprint: that the text must have; None: any.

    Raises:
        ChangedText: the text has another fingerprint; nothing was written. A ValueError.
        ValueError: there is no text, a file is malformed, the split leaves nothing to train on or nothing to hold
            out, or the folder prepared earlier is damaged.
        OSError: the disk is full, or a folder cannot be written.
    """
    report = progress or silent
    corpus = _Corpus(config, report)
    stamps = corpus.stamps()
    found = _fingerprint(config, corpus, report)
    if fingerprint not in (None, found):
        raise ChangedText(
            f"{corpus.source.name}: the text has changed (fingerprint {fingerprint[:12]} then, {found[:12]} now)"
        )
    fingerprint = found
    target = Path(config.dir, folder_name(_name(config), fingerprint)).expanduser().absolute()
    existing = find_prepared(fingerprint, [target.parent])
    if existing is not None or target.exists():
        return open_prepared(existing or target, fingerprint=fingerprint, progress=report)
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target, lambda: report("waiting for another preparation", 0, None)):
        remove_leftovers(target)
        if not target.exists():
            with staged(target) as temporary:
                _write(temporary, config, corpus, fingerprint)
                if corpus.stamps() != stamps:
                    raise ValueError(f"{corpus.source.name}: a file changed during preparation; prepare again")
    return open_prepared(target, fingerprint=fingerprint, verify=False)


def paths(config: DataConfig) -> list[str | None]:
    """Where the text is read from: the keys of a data section that are no part of the fingerprint's settings, since
    the content of the files is."""
    return [getattr(part, "path", None) for part in (config.source, config.validation, config.tokenizer)]


class _Corpus:
    """The text of a data section, split; every pass streams it again.

    Attributes:
        seen: number of documents in the last pass: of the source ("documents"), of each split, "empty",
            "held_out_copies".
    """

    def __init__(self, config: DataConfig, report: ReportProgress):
        self.source = open_source(config.source)
        self.validation = None if config.validation is None else open_source(config.validation)
        self.seen: Counter = Counter()
        self._split, self._report = config.split, report
        self._total: int | None = None  # bytes of text, known after the first pass

    def files(self) -> list[Path]:
        return self.source.files + (self.validation.files if self.validation else [])

    def stamps(self) -> list[tuple[int, int]]:
        """Sizes and times of the files, to tell whether one changed."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.files())]

    def parts(self, stage: str) -> Iterator[tuple[str, str]]:
        """Yields (split, text), a validation source first.

        Raises:
            ValueError: at the end, if there was no text or a split had none.
        """
        self.seen = Counter()
        meter = Meter(self._report, stage, self._total)
        held_out = set()
        if self.validation is not None:
            for text in self._texts(self.validation, meter):
                held_out.add(content_digest(text))
                self.seen[VALIDATION] += 1
                yield VALIDATION, text
        for text in self._texts(self.source, meter):
            self.seen["documents"] += 1
            if self.validation is None:
                for split, part in split_document(text, self._split):
                    self.seen[split] += 1
                    yield split, part
            elif content_digest(text) in held_out:
                self.seen["held_out_copies"] += 1
            else:
                self.seen[TRAIN] += 1
                yield TRAIN, text
        self._check()
        meter.finish()
        self._total = meter.done

    def _texts(self, source: Source, meter: Meter) -> Iterator[str]:
        for document in source.documents():
            if not document.text or document.text.isspace():
                self.seen["empty"] += 1
                continue
            meter.advance(len(document.text.encode()))
            yield document.text

    def _check(self) -> None:
        read = {"documents": self.source} | ({VALIDATION: self.validation} if self.validation else {})
        for key, source in read.items():
            if not self.seen[key]:
                raise ValueError(f"{source.name}: no text in {_count(len(source.files), 'file')}")
        documents = _count(self.seen["documents"], "document")
        if self.validation is not None:
            if not self.seen[TRAIN]:
                raise ValueError(
                    f"{self.source.name}: all {documents} are in the validation source too; name other text"
                )
            return
        for side, what, change in (
            (VALIDATION, "nothing to hold out", "raise"),
            (TRAIN, "nothing to train on", "lower"),
        ):
            if not self.seen[side]:
                rule = f"split {self._split.type} with fraction {self._split.fraction}"
                remedy = f"{change} split.fraction, use split.type tail, or name a validation source"
                raise ValueError(f"{self.source.name}: {rule} leaves {what} of {documents}; {remedy}")


def _write(directory: Path, config: DataConfig, corpus: _Corpus, fingerprint: str) -> None:
    """Fill an empty folder with shards, tokenizer and manifest."""
    tokenizer = _tokenizer(config, corpus)
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    writers = {
        split: ShardWriter(directory, split, dtype=dtype, eot_id=tokenizer.eot_id, shard_tokens=config.shard_tokens)
        for split in (TRAIN, VALIDATION)
    }
    loss = LossCheck(tokenizer)
    held_out_source = (corpus.validation or corpus.source).name
    for batch in _batches(corpus.parts("tokenizing")):
        encoded = tokenizer.encode_batch([text for _, text in batch])
        for (split, text), ids in zip(batch, encoded, strict=True):
            raw = text.encode()
            if (ids == tokenizer.eot_id).any():
                raise ValueError(
                    f"{corpus.source.name}: the tokenizer turns text into its end-of-text id {tokenizer.eot_id}, "
                    "which would end documents early; set another tokenizer.end_of_text"
                )
            if split == VALIDATION:
                loss.held_out(ids, raw, held_out_source)
            else:
                loss.training(ids, raw)
            writers[split].add(ids, len(raw))
    loss.warn(corpus.source.name)
    checksums = {name: sha256_file(directory / name) for name in tokenizer.save(directory)}
    for writer in writers.values():
        writer.close()
        checksums |= writer.checksums
    manifest = {
        "fingerprint": fingerprint,
        "config": config.model_dump(mode="json", exclude={"dir", "document_mask"}),
        "files_read": len(corpus.files()),
        "tokenizer": {
            "type": config.tokenizer.type,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "fingerprint": tokenizer.fingerprint,
            "lossy_training_documents": loss.lossy,
        },
        "dtype": dtype,
        "splits": {split: writer.summary() for split, writer in writers.items()},
        "dropped": {"empty": corpus.seen["empty"], "copies_of_held_out": corpus.seen["held_out_copies"]},
    }
    write_manifest(directory, manifest, checksums)


def _batches(parts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Consecutive parts of about _BATCH_CHARACTERS together: enough for every core, small enough for memory."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenizer(config: DataConfig, corpus: _Corpus) -> Tokenizer:
    if isinstance(config.tokenizer, BPETokenizerConfig):
        training = (text for split, text in corpus.parts("training tokenizer") if split == TRAIN)
        return train_bpe(training, config.tokenizer.vocab_size)
    if isinstance(config.tokenizer, FileTokenizerConfig):
        tokenizer = read_tokenizer_file(config.tokenizer.path, config.tokenizer.end_of_text)
        check_vocab_size(config.tokenizer, tokenizer.vocab_size)
        return tokenizer
    return ByteTokenizer()


def _fingerprint(config: DataConfig, corpus: _Corpus, report: ReportProgress) -> str:
    meter = Meter(report, "hashing", sum(path.stat().st_size for path in corpus.files()))
    content = [
        None if source is None else [sha256_file(path, meter.advance) for path in source.files]
        for source in (corpus.source, corpus.validation)
    ]
    meter.finish()
    settings = config.model_dump(mode="json", exclude={"dir", "document_mask"})
    for section in ("source", "validation", "tokenizer"):
        if settings[section] is not None:
            settings[section].pop("path", None)
    if config.validation is not None:
        settings.pop("split")
    if isinstance(config.tokenizer, FileTokenizerConfig):
        settings["tokenizer"].pop("vocab_size")  # the file decides it
        try:
            settings["tokenizer"]["sha256"] = sha256_file(Path(config.tokenizer.path).expanduser())
        except OSError as error:
            raise ValueError(f"tokenizer {config.tokenizer.path}: {error.strerror or error}") from None
    key = json.dumps([FORMAT_VERSION, settings, content], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()


def _name(config: DataConfig) -> str:
    """A readable name of the source, for the folder."""
    path = getattr(config.source, "path", "sotu")
    stem = Path(path).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:40] or config.source.type


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
