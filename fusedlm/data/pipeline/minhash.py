"""MinHash signatures and the buckets in which documents agree."""

import re
import resource
import unicodedata

import numpy as np
import xxhash
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import NUMBERS_PATTERN, PUNCTUATION

from fusedlm.config.pipeline import MinHash
from fusedlm.data.pipeline.filters import Words, words_of
from fusedlm.data.pipeline.work import Work

_PRIME = np.uint64((1 << 61) - 1)
_BLOCK = 512  # n-grams at a time: the hashes of a block stay in cache


def minhash_config(config: MinHash) -> MinhashConfig:
    return MinhashConfig(
        n_grams=config.n_grams,
        num_buckets=config.buckets,
        hashes_per_bucket=config.hashes,
        seed=config.seed,
        hash_config=HashConfig(precision=64, hash_fc="xxhash"),
    )


class Signatures(MinhashDedupSignature):
    """The signatures of datatrove, value for value, in less time and in memory that does not grow with the document
    (datatrove holds all hashes of a document: 150 MB per megabyte of text)."""

    def __init__(self, work: Work):
        pipeline = work.config.pipeline
        super().__init__(
            str(work.folder / "signatures"),
            config=minhash_config(pipeline.near),
            language=words_of(pipeline.language),
        )

        self._hash_func = hash_words

    def get_shingles(self, text: str) -> np.ndarray:
        """(n-grams, 1) uint64."""
        if not isinstance(self.word_tokenizer, Words):  # words of others can have spaces
            return super().get_shingles(text)
        words = _simplify(text).split()
        raw = " ".join(words).encode()
        n = self.config.n_grams
        if len(words) < n:
            return np.empty((0, 1), np.uint64)
        ends = np.append(np.flatnonzero(np.frombuffer(raw, np.uint8) == 32), len(raw))
        starts = np.append(0, ends[:-1] + 1)[: len(words) - n + 1].tolist()
        stops = ends[n - 1 :].tolist()
        digest = xxhash.xxh64_intdigest
        hashes = [digest(raw[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        return np.array(hashes, np.uint64).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """For each bucket, the least values of its hash functions."""
        a, b = self.parameters
        least = np.full(self.num_hashes, _PRIME, np.uint64)
        for start in range(0, len(shingles), _BLOCK):
            values = shingles[start : start + _BLOCK] * a + b
            # The remainder by 2^61 - 1 without a division.
            high = values >> np.uint64(61)
            values &= _PRIME
            values += high
            np.subtract(values, _PRIME, out=values, where=values >= _PRIME)
            np.minimum(least, values.min(axis=0), out=least)
        return [bucket.tolist() for bucket in np.split(least, self.config.num_buckets)]


def _simplify(text: str) -> str:
    """`simplify_text` of datatrove with its default settings, up to white space, in a fraction of the time."""
    text = NUMBERS_PATTERN.sub("0", text.lower())
    text = " ".join(_PUNCTUATION.sub(" ", text).split())
    return _NOT_ASCII.sub(_without_marks, unicodedata.normalize("NFD", text))


def hash_words(words: str) -> int:
    """xxHash64 of the words in UTF-8. datatrove passes the text itself, which xxhash 4 refuses."""
    return xxhash.xxh64_intdigest(words.encode())


_PUNCTUATION = re.compile(f"[{re.escape(PUNCTUATION)}]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def _without_marks(match: re.Match) -> str:
    return "".join(c for c in match[0] if unicodedata.category(c) != "Mn")


class Buckets(MinhashDedupBuckets):
    """The pairs of datatrove. It opens the signatures of all tasks at once, more than the usual limit of open files."""

    def __init__(self, work: Work):
        super().__init__(
            str(work.folder / "signatures"),
            str(work.folder / "near"),
            config=minhash_config(work.config.pipeline.near),
            lines_to_buffer=1000,
        )
        self._n_tasks = work.n_tasks

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = self._n_tasks + 100
        if soft != resource.RLIM_INFINITY and soft < needed:
            if hard != resource.RLIM_INFINITY and hard < needed:
                raise ValueError(
                    f"data.pipeline.tasks: {self._n_tasks} tasks need {needed} open files, and the limit is {hard}; "
                    "set fewer tasks"
                )
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        super().run(data, rank, world_size)
