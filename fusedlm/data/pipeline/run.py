"""The stages of a preparation at scale, in order."""

from pathlib import Path

from fusedlm.config.data import DataConfig
from fusedlm.data.corpus import Corpus
from fusedlm.data.meter import ReportProgress
from fusedlm.data.pipeline.assembly import Finish, Layout, WriteShards
from fusedlm.data.pipeline.duplicates import Clusters, ExactPairs
from fusedlm.data.pipeline.executors import Stage, run_stages, wait_for_workers
from fusedlm.data.pipeline.filters import words_of
from fusedlm.data.pipeline.minhash import Buckets, Signatures
from fusedlm.data.pipeline.reading import Keep, ReadFiles, store
from fusedlm.data.pipeline.spans import HeldOutSpans, SearchSpans
from fusedlm.data.pipeline.tokens import MakeTokenizer, Tokenize
from fusedlm.data.pipeline.work import Work, group_files
from fusedlm.data.staging import remove_work, work_path

_EXACT_TASKS = 16  # at most; each reads all digests


def run_pipeline(
    target: Path, config: DataConfig, corpus: Corpus, fingerprint: str, stamps: list, report: ReportProgress
) -> None:
    """Write a prepared folder. The caller holds the lock of `target`.

    The work is in the hidden folder .NAME.work beside it, which a later call continues after a failure or a kill.

    Args:
        stamps: of the files of `corpus`, before they were hashed.

    Raises:
        Submitted: to a cluster; the folder will be there later.
        ValueError: a task failed; the first error of a document, a file or the settings.
    """
    work = plan(target, config, corpus, fingerprint)
    if corpus.stamps() != stamps:
        raise ValueError(f"{corpus.name}: a file changed during preparation; prepare again")
    words_of(config.pipeline.language)  # before anything runs
    wait_for_workers(work.folder, report)
    work.begin()
    run_stages(stages(work), work.folder, config.pipeline.executor, report)
    remove_work(target)


def plan(target: Path, config: DataConfig, corpus: Corpus, fingerprint: str) -> Work:
    """The work of a data section, with nothing written."""
    groups = group_files(corpus, config.pipeline.tasks)
    files = [path.stat() for group in groups for path in group.files]
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in files)
    return Work(work_path(target), target, config, fingerprint, groups, stamps)


def stages(work: Work) -> list[Stage]:
    by_size = [group.n_bytes for group in work.groups]
    near = work.config.pipeline.near
    read = [ReadFiles(work), Keep(work), store(work)]
    found = [Stage("read", read + ([Signatures(work)] if near else []), by_size)]
    found.append(Stage("exact", [ExactPairs(work)], [1] * min(_EXACT_TASKS, work.n_tasks)))
    if near:
        found.append(Stage("near", [Buckets(work)], [1] * near.buckets))
    found += [
        Stage("clusters", [Clusters(work)], [1], is_single=True),
        Stage("tokenizer", [MakeTokenizer(work)], [1], is_single=True),
        Stage("tokens", [Tokenize(work)], by_size),
    ]
    if work.span:
        found += [
            Stage("spans", [HeldOutSpans(work)], [1], is_single=True),
            Stage("search", [SearchSpans(work)], by_size),
        ]
    return found + [
        Stage("layout", [Layout(work)], [1], is_single=True),
        Stage("shards", [WriteShards(work)], by_size),
        Stage("finish", [Finish(work)], [1], is_single=True),
    ]
