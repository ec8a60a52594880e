"""Pairs of documents with the same text, clusters of pairs, and which documents are removed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from fusedlm.data.pipeline.work import WorkStep

_PAIR = np.dtype([("first", "<u4", 2), ("second", "<u4", 2)])  # (task, document in the task), as datatrove writes


class ExactPairs(WorkStep):
    """Pairs each document with the first one of the same digest.

    datatrove's block keeps the document with the smallest number in its task, whichever task that is: which text is
    kept then depends on the tasks.
    """

    type = "duplicates"
    name = "exact pairs"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        work = self._work
        parts = []
        for task, first in enumerate(work.offsets[:-1]):
            rows = work.index(task)
            own = np.flatnonzero(rows["high"] % np.uint64(world_size) == rank)
            part = np.empty(len(own), [("high", "<u8"), ("low", "<u8"), ("number", "<i8"), ("protected", "?")])
            part["high"], part["low"] = rows["high"][own], rows["low"][own]
            part["number"], part["protected"] = own + first, work.groups[task].is_validation
            parts.append(part)
        rows = np.concatenate(parts)
        rows = rows[np.lexsort((rows["number"], rows["low"], rows["high"]))]
        new = np.ones(len(rows), bool)
        new[1:] = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
        heads = np.flatnonzero(new)[np.cumsum(new) - 1]  # the first row of each one's digest
        paired = ~new
        if not work.config.pipeline.exact:  # copies of data.validation are removed all the same
            paired &= rows["protected"][heads]
        pairs = np.stack([rows["number"][heads[paired]], rows["number"][paired]], axis=1)
        np.save(work.path("exact", f"{rank:05d}.npy"), pairs)


class Clusters(WorkStep):
    """Removes all but the first document of each cluster of pairs; held-out documents come before all others.

    Instead of datatrove's block, which keeps whichever document its sets are named after (that depends on the tasks),
    and keeps them in dictionaries of Python: here 8 bytes per document and the pairs of one bucket are in memory.
    """

    type = "duplicates"
    name = "clusters"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        work = self._work
        offsets = np.array(work.offsets)
        held_out = np.concatenate([work.index(task)["held_out"] for task in range(work.n_tasks)])
        protected = np.repeat([group.is_validation for group in work.groups], np.diff(offsets))
        n_held_out = int(held_out.sum())
        # Position with held-out documents first; otherwise in order.
        position = np.where(held_out, np.cumsum(held_out) - 1, n_held_out + np.cumsum(~held_out) - 1)
        labels = np.arange(len(position))
        counts = Counter()
        removed = np.zeros(len(position), bool)

        def count(copies: str, of_held_out: str) -> None:
            """Names for what was removed since the last call."""
            head = labels[position]
            now = (head != position) & ~protected
            fresh = now & ~removed
            leaks = fresh & ~held_out & (head < n_held_out)
            counts[of_held_out], counts[copies] = int(leaks.sum()), int((fresh & ~leaks).sum())
            removed[:] = now

        for path in sorted(work.folder.joinpath("exact").glob("*.npy")):
            pairs = position[np.load(path)]
            unite(labels, pairs[:, 0], pairs[:, 1])
        count("exact", "copies_of_held_out")
        for path in sorted(work.folder.joinpath("near").glob("*.dups")):
            pairs = _read_pairs(path, offsets)
            unite(labels, position[pairs[0]], position[pairs[1]])
        count("near", "near_held_out")
        for task in range(work.n_tasks):
            own = np.flatnonzero(removed[offsets[task] : offsets[task + 1]])
            # The format and the name that datatrove's MinhashDedupFilter reads.
            work.path("remove", f"{task:06d}.remove").write_bytes(own.astype("<u4").tobytes())
        work.path("remove", "counts.json").write_text(json.dumps(counts))


def _read_pairs(path: Path, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents of each pair that `Buckets` found."""
    pairs = np.fromfile(path, _PAIR)
    return tuple(offsets[pairs[side][:, 0]] + pairs[side][:, 1] for side in ("first", "second"))


def unite(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Join the sets of a[i] and b[i], for every i.

    Args:
        labels: (n,) int64; the least member of the set of each one, before and after. Changed in place.
        a, b: (pairs,) int64.
    """
    while True:
        low, high = labels[a], labels[b]
        differ = low != high
        if not differ.any():
            return
        a, b, low, high = a[differ], b[differ], low[differ], high[differ]
        np.minimum.at(labels, np.maximum(low, high), np.minimum(low, high))
        while not np.array_equal(up := labels[labels], labels):
            labels[:] = up
