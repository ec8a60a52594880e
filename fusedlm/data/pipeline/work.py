"""The folder that a preparation at scale works in: its plan, and where each stage writes."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from datatrove.pipeline.base import PipelineStep

from fusedlm import __version__
from fusedlm.config.data import BytesTokenizerConfig, DataConfig
from fusedlm.data.corpus import Corpus
from fusedlm.data.pipeline.requirements import versions
from fusedlm.data.remote import RemoteFile
from fusedlm.files import write_atomic

VERSION = 1  # of what stages write
_TASKS = 256  # about so many, unless their files would be smaller or larger than
_SMALLEST, _LARGEST = 4 << 20, 1 << 30  # bytes

# A stored document: the first 16 bytes of its content digest, and whether it is held out.
INDEX = np.dtype([("high", "<u8"), ("low", "<u8"), ("held_out", "?")])
# A tokenized document: tokens with end-of-text, and UTF-8 bytes.
LENGTHS = np.dtype([("tokens", "<i8"), ("bytes", "<i8")])


@dataclass(frozen=True)
class Group:
    """The files that one task reads."""

    source: str | None
    is_validation: bool  # of data.validation: never filtered or removed
    files: tuple[Path | RemoteFile, ...]
    n_bytes: int


@dataclass(frozen=True)
class Work:
    """All that a task needs to know; it is sent to the process that runs the task.

    Attributes:
        groups: one per task, in the order of the documents.
        stamps: of the files, as `Corpus.stamps`.
    """

    folder: Path
    target: Path
    config: DataConfig
    fingerprint: str
    groups: tuple[Group, ...]
    stamps: tuple

    @property
    def n_tasks(self) -> int:
        return len(self.groups)

    @property
    def span(self) -> int:
        """Length of the held-out spans that training text may not have; 0: any."""
        given = self.config.pipeline.held_out_span
        if given is not None:
            return given
        return 200 if isinstance(self.config.tokenizer, BytesTokenizerConfig) else 50

    def path(self, *parts: str) -> Path:
        """A path in the folder, whose parent exists."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def index(self, task: int) -> np.ndarray:
        """INDEX of the stored documents of a task."""
        return np.load(self.folder / "index" / f"{task:05d}.npy")

    @cached_property
    def offsets(self) -> list[int]:
        """Number of the first stored document of each task, and the number of all."""
        sizes = (len(np.load(self.folder / "index" / f"{t:05d}.npy", mmap_mode="r")) for t in range(self.n_tasks))
        return [0, *accumulate(sizes)]

    @property
    def dtype(self) -> np.dtype:
        """Of stored tokens; the tokenizer decides it."""
        return np.dtype((self.folder / "dtype").read_text())

    def begin(self) -> None:
        """Keep what is left of the same work, and nothing of other work in the folder."""
        plan = {
            "version": VERSION,
            "fusedlm": __version__,
            "packages": versions(),
            "fingerprint": self.fingerprint,
            "files": [[group.source, *map(str, group.files)] for group in self.groups],
            "stamps": list(map(list, self.stamps)),
        }
        text = json.dumps(plan, indent=1) + "\n"
        path = self.folder / "plan.json"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_atomic(path, text)


class WorkStep(PipelineStep):
    """A step of datatrove that knows the work it is part of."""

    def __init__(self, work: Work):
        super().__init__()
        self._work = work


def group_files(corpus: Corpus, tasks: int | None) -> tuple[Group, ...]:
    """Consecutive files of a source, as many as one task reads.

    Args:
        tasks: largest number of tasks; None: by size.
    """
    sources = [(None, True, corpus.validation)] if corpus.validation else []
    sources += [(name, False, source) for name, source in corpus.sources.items()]
    for _, _, source in sources:
        if source.copy is not None:
            raise ValueError(f"{source.name}: a pipe can be read only once; data.pipeline needs files")
    sizes = [[path.stat().st_size for path in source.files] for _, _, source in sources]
    total = sum(map(sum, sizes))
    # Every source ends a group, so each but one can have one more than its share.
    wanted = total / max(1, tasks + 1 - len(sources)) if tasks else min(max(total / _TASKS, _SMALLEST), _LARGEST)
    groups = []
    for (name, is_validation, source), each in zip(sources, sizes, strict=True):
        files, size = [], 0
        for path, n_bytes in zip(source.files, each, strict=True):
            files.append(path)
            size += n_bytes
            if size >= wanted:
                groups.append(Group(name, is_validation, tuple(files), size))
                files, size = [], 0
        if files:
            groups.append(Group(name, is_validation, tuple(files), size))
    return tuple(groups)
