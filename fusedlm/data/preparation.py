"""From a recipe's data section to a folder of token shards, named by a fingerprint of settings and text: what is
prepared is not prepared again."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from fusedlm.config.data import BPETokenizerConfig, DataConfig, FileTokenizerConfig
from fusedlm.data.corpus import Corpus, Part
from fusedlm.data.lookup import find_prepared
from fusedlm.data.lossless import LossCheck
from fusedlm.data.manifest import FORMAT_VERSION, folder_name, write_manifest
from fusedlm.data.meter import Meter, ReportProgress, silent
from fusedlm.data.remote import RemoteFile
from fusedlm.data.shards import PreparedData, ShardWriter, open_prepared
from fusedlm.data.split import TRAIN, VALIDATION
from fusedlm.data.staging import exclusive, remove_leftovers, remove_work, staged
from fusedlm.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer_file, train_bpe
from fusedlm.data.vocabulary import check_vocab_size
from fusedlm.files import sha256_file

BATCH_CHARACTERS = 1 << 22
T = TypeVar("T")


class ChangedText(ValueError):
    """The source does not hold the requested text."""


class Submitted(ValueError):
    """The text is being prepared by a cluster; its folder will be there when the tasks have ended."""


def prepare(
    config: DataConfig, progress: ReportProgress | None = None, *, fingerprint: str | None = None
) -> PreparedData:
    """Prepare the data of a recipe, or open what an earlier call prepared.

    The folder is `config.dir`/<source>-<fingerprint>, or any other in `config.dir` whose manifest has the fingerprint.
    The fingerprint covers the settings that the stored text depends on, and the content of the source's files, not
    their paths; each call therefore reads the source once to hash it (about 1.8 GB/s per core where the processor has
    SHA instructions). The folder appears complete or not at all, and a second preparation at the same time waits for
    the first. Text is streamed: memory holds the largest
    document, a few batches of tokens, and 8 bytes per document of each split; training a BPE tokenizer also counts
    every distinct word, and with several sources reads the text once more to learn their sizes.

    With `config.pipeline` the text is prepared in tasks (fusedlm.data.pipeline), and what a killed preparation has done
    is not done again.

    Args:
        progress: called as progress(stage, done, total or None) with bytes done; stages are "hashing", "waiting for
            another preparation", "counting", "training tokenizer", "tokenizing" and "verifying", and those of a
            pipeline.
        fingerprint: that the text must have; None: any.

    Raises:
        ChangedText: the text has another fingerprint; nothing was written. A ValueError.
        Submitted: a cluster prepares the text; call again when it has. A ValueError.
        ValueError: there is no text, a file is malformed, the split leaves nothing to train on or nothing to hold
            out, or the folder prepared earlier is damaged.
        OSError: the disk is full, or a folder cannot be written.
    """
    report = progress or silent
    corpus = Corpus(config, report)
    stamps = corpus.stamps()
    found = _fingerprint(config, corpus, report)
    if fingerprint not in (None, found):
        raise ChangedText(
            f"{corpus.name}: the text has changed (fingerprint {fingerprint[:12]} then, {found[:12]} now)"
        )
    fingerprint = found
    target = Path(config.dir, folder_name(_name(config), fingerprint)).expanduser().absolute()
    existing = find_prepared(fingerprint, [target.parent])
    if existing is not None or target.exists():
        remove_work(target)
        return open_prepared(existing or target, fingerprint=fingerprint, progress=report)
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target, lambda: report("waiting for another preparation", 0, None)):
        remove_leftovers(target)
        if not target.exists() and config.pipeline is not None:
            _run_pipeline(target, config, corpus, fingerprint, stamps, report)
        elif not target.exists():
            with staged(target) as temporary:
                _write(temporary, config, corpus, fingerprint)
                if corpus.stamps() != stamps:
                    raise ValueError(f"{corpus.name}: a file changed during preparation; prepare again")
    return open_prepared(target, fingerprint=fingerprint, verify=False)


def _run_pipeline(target: Path, *work) -> None:
    """`run_pipeline`, whose modules import datatrove, which is optional."""
    from fusedlm.data.pipeline.requirements import require_datatrove

    require_datatrove()
    from fusedlm.data.pipeline.run import run_pipeline

    run_pipeline(target, *work)


def paths(config: DataConfig) -> list[str | None]:
    """Where the text is read from: the keys of a data section that are no part of the fingerprint's settings, since
    the content of the files is."""
    parts = (*config.named_sources().values(), config.validation, config.tokenizer)
    return [getattr(part, "path", None) for part in parts]


def _write(directory: Path, config: DataConfig, corpus: Corpus, fingerprint: str) -> None:
    """Fill an empty folder with shards, tokenizer and manifest."""
    tokenizer = recipe_tokenizer(config, corpus.parts)
    dtype = stored_dtype(tokenizer)
    writers = {
        split: ShardWriter(directory, split, dtype=dtype, eot_id=tokenizer.eot_id, shard_tokens=config.shard_tokens)
        for split in (TRAIN, VALIDATION)
    }
    loss = LossCheck(tokenizer)
    held_out_source = corpus.validation.name if corpus.validation else corpus.name
    for batch in text_batches(corpus.parts("tokenizing")):
        encoded = tokenizer.encode_batch([part.text for part in batch])
        for (split, text, source), ids in zip(batch, encoded, strict=True):
            raw = text.encode()
            refuse_end_of_text(ids, tokenizer, corpus.name)
            if split == VALIDATION:
                loss.held_out(ids, raw, held_out_source)
            else:
                loss.training(ids, raw)
            writers[split].add(ids, len(raw), source)
    loss.warn(corpus.name)
    checksums = {name: sha256_file(directory / name) for name in tokenizer.save(directory)}
    for writer in writers.values():
        writer.close()
        checksums |= writer.checksums
    manifest = describe(
        config,
        fingerprint,
        tokenizer,
        files_read=len(corpus.files()),
        lossy=loss.lossy,
        splits={split: writer.summary() for split, writer in writers.items()},
        dropped={"empty": corpus.seen["empty"], "copies_of_held_out": corpus.seen["held_out_copies"]},
        shards_by_source={split: writer.sources for split, writer in writers.items()},
    )
    write_manifest(directory, manifest, checksums)


def describe(
    config: DataConfig,
    fingerprint: str,
    tokenizer: Tokenizer,
    *,
    files_read: int,
    lossy: int,
    splits: dict[str, dict],
    dropped: dict[str, int],
    shards_by_source: dict[str, dict],
) -> dict:
    """The manifest of a prepared folder, without its files.

    Args:
        lossy: training documents that the tokenizer changed.
        splits: summaries of the shards.
        shards_by_source: number of shards by split and source.
    """
    manifest = {
        "fingerprint": fingerprint,
        "config": stored_settings(config),
        "files_read": files_read,
        "tokenizer": {
            "type": config.tokenizer.type,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "fingerprint": tokenizer.fingerprint,
            "lossy_training_documents": lossy,
        },
        "dtype": stored_dtype(tokenizer),
        "splits": splits,
        "dropped": dropped,
    }
    if config.sources is not None:
        manifest["sources"] = [
            {"name": name} | {split: found.get(name, 0) for split, found in shards_by_source.items()}
            for name in config.named_sources()
        ]
    return manifest


def stored_dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def refuse_end_of_text(ids: np.ndarray, tokenizer: Tokenizer, source: str) -> None:
    """Raises ValueError if the tokenizer turned text into its end-of-text id."""
    if (ids == tokenizer.eot_id).any():
        raise ValueError(
            f"{source}: the tokenizer turns text into its end-of-text id {tokenizer.eot_id}, "
            "which would end documents early; set another tokenizer.end_of_text"
        )


def text_batches(parts: Iterable[T]) -> Iterator[list[T]]:
    """Consecutive parts, which have a `text`, of about BATCH_CHARACTERS together: enough for every core, small enough
    for memory."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def recipe_tokenizer(config: DataConfig, parts: Callable[[str], Iterable[Part]]) -> Tokenizer:
    """The tokenizer that a data section names, trained if it is to be.

    Args:
        parts: a pass over the text, as `Corpus.parts`; called with the name of the stage.
    """
    if isinstance(config.tokenizer, BPETokenizerConfig):
        return train_bpe(_weighted_training_text(config, parts), config.tokenizer.vocab_size)
    if isinstance(config.tokenizer, FileTokenizerConfig):
        tokenizer = read_tokenizer_file(config.tokenizer.path, config.tokenizer.end_of_text)
        check_vocab_size(config.tokenizer, tokenizer.vocab_size)
        return tokenizer
    return ByteTokenizer()


def _weighted_training_text(config: DataConfig, parts: Callable[[str], Iterable[Part]]) -> Iterator[str]:
    """The training text; of several sources, about as much as there is, in the shares of `tokenizer_weights`: documents
    are left out or repeated at regular intervals."""
    sizes: Counter = Counter()
    if config.sources is not None:
        for split, text, source in parts("counting"):
            sizes[source] += len(text.encode()) * (split == TRAIN)
    wanted = {name: weight * sizes.total() for name, weight in tokenizer_weights(config).items()}
    read, given = Counter(), Counter()
    for split, text, source in parts("training tokenizer"):
        if split != TRAIN:
            continue
        if config.sources is None:
            yield text
            continue
        size = len(text.encode())
        read[source] += size
        while given[source] + size / 2 <= wanted[source] * read[source] / sizes[source]:
            given[source] += size
            yield text


def tokenizer_weights(config: DataConfig) -> dict[str, float]:
    """Fractions of the sources in the text that a tokenizer is trained on: the mean of those of the stages. It does not
    depend on how long stages are, so that a run of another length has the same tokenizer."""
    stages = [{name: weight / sum(one.values()) for name, weight in one.items()} for one in config.weights() if one]
    return {name: sum(stage.get(name, 0.0) for stage in stages) / len(stages) for name in sorted(config.sources or {})}


def stored_settings(config: DataConfig) -> dict:
    """The settings of a data section that the stored text depends on."""
    keys = {"validation", "split", "tokenizer", "shard_tokens"}
    pipeline = {} if config.pipeline is None else {"pipeline": config.pipeline.text_settings()}
    if config.sources is None:
        return config.model_dump(mode="json", include=keys | {"source"}) | pipeline
    settings = config.model_dump(mode="json", include=keys) | pipeline
    settings["sources"] = {name: source.model_dump(mode="json") for name, source in config.named_sources().items()}
    if isinstance(config.tokenizer, BPETokenizerConfig):
        settings["tokenizer"]["weights"] = {name: round(w, 9) for name, w in tokenizer_weights(config).items()}
    return settings


def _fingerprint(config: DataConfig, corpus: Corpus, report: ReportProgress) -> str:
    meter = Meter(report, "hashing", sum(path.stat().st_size for path in corpus.files()))
    content = [
        None if source is None else [_content(path, meter) for path in source.files]
        for source in (*corpus.sources.values(), corpus.validation)
    ]
    meter.finish()
    settings = stored_settings(config)
    sources = settings["sources"].values() if config.sources is not None else [settings["source"]]
    for section in (*sources, settings["validation"], settings["tokenizer"]):
        if section is not None:
            section.pop("path", None)
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


def _content(path: Path | RemoteFile, meter: Meter) -> str:
    """A digest of a file; of a remote one, of what its file system says it holds."""
    if isinstance(path, RemoteFile):
        meter.advance(path.stat().st_size)
        return path.identity()
    return sha256_file(path, meter.advance)


def _name(config: DataConfig) -> str:
    """A readable name of the source, for the folder."""
    if config.sources is not None:
        stem = "-".join(sorted(config.sources))
    else:
        stem = Path(getattr(config.source, "path", "sotu")).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:40] or getattr(config.source, "type", "sources")
