"""From the tokens of tasks to the shards and the manifest of a prepared folder."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator

import numpy as np

from fusedlm.data.manifest import write_manifest
from fusedlm.data.pipeline.spans import open_tokens
from fusedlm.data.pipeline.work import Work, WorkStep
from fusedlm.data.preparation import describe
from fusedlm.data.shards import ShardWriter
from fusedlm.data.split import TRAIN, VALIDATION
from fusedlm.data.tokenizer import load_tokenizer
from fusedlm.files import sha256_file, sync, write_atomic

_log = logging.getLogger(__name__)


class Layout(WorkStep):
    """Writes where each shard begins and ends, cut as `ShardWriter` cuts: a list of

        split, number, source, begin, end    begin and end: (task, number of the kept document in the task)
    """

    type = "shards"
    name = "layout"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        _refuse_nothing(self._work)
        shards = []
        for split in (TRAIN, VALIDATION):
            number, limit = 0, self._work.config.shard_tokens
            source, size, current = None, 0, None
            for task, group in enumerate(self._work.groups):
                lengths = _kept_lengths(self._work, task, split)
                ends = np.concatenate([[0], np.cumsum(lengths)])
                first = 0
                while first < len(lengths):
                    if current is None or group.source != source or size + lengths[first] > limit:
                        source, size = group.source, 0
                        current = {"split": split, "number": number, "source": source, "begin": [task, first]}
                        shards.append(current)
                        number += 1
                    # As many documents as fit; one that is longer than a shard is a shard of its own.
                    last = int(np.searchsorted(ends, ends[first] + limit - size, side="right")) - 1
                    last = max(last, first + 1 if size == 0 else first)
                    size += int(ends[last] - ends[first])
                    current["end"] = [task, last]
                    first = last
        write_atomic(self._work.path("layout.json"), json.dumps(shards))


def _kept_lengths(work: Work, task: int, split: str) -> np.ndarray:
    return open_tokens(work, task, split)[1]["tokens"][kept_rows(work, task, split)]


def kept_rows(work: Work, task: int, split: str) -> np.ndarray:
    """Which tokenized documents of a task are stored, as their numbers."""
    rows = np.load(work.folder / "tokens" / f"{task:05d}.{split}.npy", mmap_mode="r")
    if split == TRAIN and work.span:
        return np.flatnonzero(~np.load(work.folder / "found" / f"{task:05d}.npy"))
    return np.arange(len(rows))


def _refuse_nothing(work: Work) -> None:
    """Raises ValueError if a source has no text, or nothing is left to train on or hold out."""
    held_out = sum(len(kept_rows(work, task, VALIDATION)) for task in range(work.n_tasks))
    keys = [(group.source, group.is_validation) for group in work.groups]
    for source, is_validation in dict.fromkeys(keys):
        tasks = [task for task, key in enumerate(keys) if key == (source, is_validation)]
        where = "data.validation" if is_validation else "data.source" if source is None else f"data.sources.{source}"
        read = sum((_counts(work, task) for task in tasks), Counter())
        documents = read["documents"] - read["empty"]
        if not documents:
            n_files = sum(len(work.groups[task].files) for task in tasks)
            raise ValueError(f"{where}: no text in {n_files} file{'s' if n_files > 1 else ''}")
        if not is_validation and not sum(len(kept_rows(work, task, TRAIN)) for task in tasks):
            raise ValueError(
                f"{where}: data.pipeline leaves nothing to train on of {documents} documents; "
                "loosen its filters, lower split.fraction, or name other text"
            )
    if not held_out:
        raise ValueError(
            f"data.split.fraction={work.config.split.fraction:g}: nothing is held out of the documents that "
            "data.pipeline keeps; raise it, or name data.validation"
        )


def _counts(work: Work, task: int) -> Counter:
    return Counter(json.loads((work.folder / "index" / f"{task:05d}.json").read_text()))


class WriteShards(WorkStep):
    """Writes every world_size-th shard of the layout."""

    type = "shards"
    name = "shards"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        work = self._work
        eot_id = load_tokenizer(work.folder / "tokenizer").eot_id
        folder = work.path("out", "x").parent
        for number, shard in enumerate(json.loads((work.folder / "layout.json").read_text())):
            if number % world_size != rank:
                continue
            writer = ShardWriter(
                folder,
                shard["split"],
                dtype=work.dtype,
                eot_id=eot_id,
                shard_tokens=2**62,  # the layout has cut
                first=shard["number"],
            )
            for ids, n_bytes in _documents(work, shard):
                writer.add(ids, n_bytes, shard["source"])
            writer.close()
            written = {"shard": writer.shards[0], "checksums": writer.checksums}
            path = work.path("written", f"{shard['split']}-{shard['number']:05d}.json")
            write_atomic(path, json.dumps(written))


def _documents(work: Work, shard: dict) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens without end-of-text, and bytes, of the documents of a shard."""
    (first_task, first), (last_task, last) = shard["begin"], shard["end"]
    for task in range(first_task, last_task + 1):
        tokens, rows = open_tokens(work, task, shard["split"])
        ends = np.cumsum(rows["tokens"])
        kept = kept_rows(work, task, shard["split"])
        own = kept[first if task == first_task else 0 : last if task == last_task else None]
        for row in own:
            yield tokens[ends[row] - rows["tokens"][row] + 1 : ends[row]], int(rows["bytes"][row])


class Finish(WorkStep):
    """Writes tokenizer and manifest, and gives the folder its name. What it works on stays until the folder is there,
    so that it can be run again."""

    type = "shards"
    name = "finish"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        work = self._work
        if work.target.exists():  # killed after the folder got its name
            return
        folder = work.folder / "out"
        tokenizer = load_tokenizer(work.folder / "tokenizer")
        checksums = {name: sha256_file(folder / name) for name in tokenizer.save(folder)}
        splits, by_source = {}, {}
        layout = json.loads((work.folder / "layout.json").read_text())
        for split in (TRAIN, VALIDATION):
            own = [shard for shard in layout if shard["split"] == split]
            by_source[split] = Counter(shard["source"] for shard in own)
            written = [
                json.loads((work.folder / "written" / f"{split}-{shard['number']:05d}.json").read_text())
                for shard in own
            ]
            shards = [one["shard"] for one in written]
            totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
            splits[split] = totals | {"shards": shards}
            for one in written:
                checksums |= one["checksums"]
        manifest = describe(
            work.config,
            work.fingerprint,
            tokenizer,
            files_read=sum(len(group.files) for group in work.groups),
            lossy=self._lossy(),
            splits=splits,
            dropped=_dropped(work),
            shards_by_source=by_source,
        )
        write_manifest(folder, manifest, checksums)
        _refuse_changes(work)
        for path in folder.iterdir():
            sync(path)
        sync(folder)
        os.rename(folder, work.target)
        sync(work.target.parent)

    def _lossy(self) -> int:
        found = [
            json.loads((self._work.folder / "tokens" / f"{task:05d}.json").read_text())
            for task in range(self._work.n_tasks)
        ]
        lossy = sum(one["documents"] for one in found)
        if lossy:
            first = next(one["first"] for one in found if one["first"])
            _log.warning(
                "the tokenizer changes %d training documents (%s); the model learns the changed text", lossy, first
            )
        return lossy


def _dropped(work: Work) -> dict[str, int]:
    """Documents that are not in the shards, by reason."""
    read = sum((_counts(work, task) for task in range(work.n_tasks)), Counter())
    removed = json.loads((work.folder / "remove" / "counts.json").read_text())
    spans = 0
    if work.span:
        spans = sum(int(np.load(work.folder / "found" / f"{task:05d}.npy").sum()) for task in range(work.n_tasks))
    filtered = {name: read[name] for name in sorted(read) if name not in ("documents", "empty")}
    return {"empty": read["empty"], **removed, "held_out_spans": spans, "filtered": filtered}


def _refuse_changes(work: Work) -> None:
    now = tuple((stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for g in work.groups for path in g.files))
    if now != work.stamps:
        shutil.rmtree(work.folder, ignore_errors=True)
        raise ValueError("data: a file changed during preparation; prepare again")
