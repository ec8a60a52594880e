"""The stage `read`, and reading what it stored."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import get_filter_result
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers import JsonlWriter

from fusedlm.data.pipeline.filters import make_filters
from fusedlm.data.pipeline.work import INDEX, Work, WorkStep
from fusedlm.data.sources import open_reader
from fusedlm.data.split import content_digest, is_held_out


class ReadFiles(BaseReader):
    """The documents of the files of a task that have text.

    The readers of datatrove pass over lines, rows and records that they cannot read, with a warning; these readers name
    the file and the place, as those of a preparation without a pipeline.
    """

    name = "files"

    def __init__(self, work: Work):
        super().__init__()
        self._work = work

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        group = self._work.groups[rank]
        config = self._work.config
        section = config.validation if group.is_validation else config.named_sources()[group.source]
        read = open_reader(section)  # the plan has found the files
        for path in group.files:
            for text, place in read(path):
                self.stat_update("documents")
                document = Document(text=text, id=place)
                self.update_doc_stats(document)
                yield document


class Keep(WorkStep):
    """Drops empty documents and those that a filter refuses; decides which are held out; writes INDEX and counts."""

    type = "filter"
    name = "filters and split"

    def __init__(self, work: Work):
        super().__init__(work)
        pipeline = work.config.pipeline
        self._filters = make_filters(pipeline.filters, pipeline.language)

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        work = self._work
        is_validation = work.groups[rank].is_validation
        choose = None
        if work.config.validation is None:
            choose = partial(is_held_out, fraction=work.config.split.fraction, seed=work.config.pipeline.seed)
        rows, counts = [], Counter()
        for document in data:
            counts["documents"] += 1
            if not document.text or document.text.isspace():
                counts["empty"] += 1
                continue
            if not is_validation and (reason := self._refusal(document)):
                counts[reason] += 1
                continue
            digest = content_digest(document.text)
            held_out = is_validation or bool(choose and choose(digest))
            high, low = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
            rows.append((high, low, held_out))
            document.metadata = {"held_out": held_out}
            yield document
        np.save(work.path("index", f"{rank:05d}.npy"), np.array(rows, INDEX))
        work.path("index", f"{rank:05d}.json").write_text(json.dumps(counts))

    def _refusal(self, document: Document) -> str | None:
        for name, one in self._filters:
            keeps, reason = get_filter_result(one.filter(document))
            if not keeps:
                return f"{name}: {reason}"
        return None


def store(work: Work) -> JsonlWriter:
    """Writes documents where `StoredDocuments` finds them."""
    return JsonlWriter(str(work.folder / "text"), compression="zstd")


class StoredDocuments(JsonlReader):
    """The documents that a task of the stage `read` stored. (datatrove's reader numbers the files that there are; a
    task that kept no document has none.)"""

    def __init__(self, work: Work):
        super().__init__(str(work.folder / "text"), compression="zstd", add_file_path=False)
        self._work = work

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        expected, found = self._work.offsets[rank + 1] - self._work.offsets[rank], 0
        if expected:
            for document in self.read_files_shard([f"{rank:05d}.jsonl.zst"]):
                found += 1
                yield document
        if found != expected:  # datatrove passes over lines that are damaged
            raise ValueError(
                f"{self._work.folder}/text/{rank:05d}.jsonl.zst: {found} of {expected} documents can be read; remove "
                f"{self._work.folder} and prepare again"
            )
