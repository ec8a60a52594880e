"""The text of a data section, split into training and validation, streamed as often as it is needed."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fusedlm.config.data import DataConfig
from fusedlm.data.meter import Meter, ReportProgress
from fusedlm.data.sources import Source, open_source
from fusedlm.data.split import TRAIN, VALIDATION, content_digest, split_document


class Part(NamedTuple):
    """Text of a document that is in one split."""

    split: str
    text: str
    source: str | None  # its name; None: the single source, or the validation source


class Corpus:
    """The text of a data section, split; every pass streams it again.

    Attributes:
        name: of the source, or of the sources, for error messages.
        sources: by name, in the order of reading; a single one has the name None.
        seen: number of documents in the last pass: of each split, "empty", "held_out_copies", and of the sources
            ("documents").
    """

    def __init__(self, config: DataConfig, report: ReportProgress):
        self.sources = {name: open_source(source) for name, source in config.named_sources().items()}
        self.name = ", ".join(dict.fromkeys(source.name for source in self.sources.values()))
        self.validation = None if config.validation is None else open_source(config.validation)
        self.seen: Counter = Counter()
        self._split, self._report = config.split, report
        self._total: int | None = None  # bytes of text, known after the first pass

    def files(self) -> list[Path]:
        return [path for source in (*self.sources.values(), self.validation) if source for path in source.files]

    def stamps(self) -> list[tuple[int, int]]:
        """Sizes and times of the files, to tell whether one changed."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.files())]

    def parts(self, stage: str) -> Iterator[Part]:
        """Yields the text of every split, a validation source first, then source by source.

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
                yield Part(VALIDATION, text, None)
            if not self.seen[VALIDATION]:
                raise ValueError(_no_text(self.validation))
        for name, source in self.sources.items():
            yield from self._split_source(name, source, held_out, meter)
        if not self.seen[VALIDATION]:
            raise ValueError(self._uneven(VALIDATION, self.name, self.seen["documents"]))
        meter.finish()
        self._total = meter.done

    def _split_source(self, name: str | None, source: Source, held_out: set[bytes], meter: Meter) -> Iterator[Part]:
        before = Counter(self.seen)
        for text in self._texts(source, meter):
            self.seen["documents"] += 1
            if self.validation is None:
                for split, part in split_document(text, self._split):
                    self.seen[split] += 1
                    yield Part(split, part, name)
            elif content_digest(text) in held_out:
                self.seen["held_out_copies"] += 1
            else:
                self.seen[TRAIN] += 1
                yield Part(TRAIN, text, name)
        documents = self.seen["documents"] - before["documents"]
        if not documents:
            raise ValueError(_no_text(source))
        if self.seen[TRAIN] == before[TRAIN]:
            raise ValueError(self._uneven(TRAIN, source.name, documents))

    def _texts(self, source: Source, meter: Meter) -> Iterator[str]:
        for document in source.documents():
            if not document.text or document.text.isspace():
                self.seen["empty"] += 1
                continue
            meter.advance(len(document.text.encode()))
            yield document.text

    def _uneven(self, side: str, name: str, n_documents: int) -> str:
        """The error about a split with nothing on one side."""
        documents = _count(n_documents, "document")
        if self.validation is not None:
            return f"{name}: all {documents} are in the validation source too; name other text"
        what, change = {VALIDATION: ("hold out", "raise"), TRAIN: ("train on", "lower")}[side]
        rule = f"split {self._split.type} with fraction {self._split.fraction}"
        remedy = f"{change} split.fraction, use split.type tail, or name a validation source"
        return f"{name}: {rule} leaves nothing to {what} of {documents}; {remedy}"


def _no_text(source: Source) -> str:
    return f"{source.name}: no text in {_count(len(source.files), 'file')}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
