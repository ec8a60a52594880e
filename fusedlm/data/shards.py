"""Token shards on disk: written once, verified on opening, read in pieces.

A prepared folder holds, for each shard of a split (`train`, `validation`),

    train-00000.bin           token ids, uint16 (vocabularies up to 65536) or uint32, little-endian
    train-00000.offsets.npy   int64 (documents + 1): start of each document, and the end of the last
    train-00000.bytes.npy     int64 (documents): UTF-8 bytes of each document's text

the tokenizer, and manifest.json: counts, the size and sha256 of every other file, and a checksum of itself. A
document lies in one shard, as [end-of-text, its tokens...]. Of several sources, each has consecutive shards, whose
numbers the manifest has, in the order of its `sources`.
"""

import hashlib
import stat
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusedlm.data.lossless import refuse_lossy
from fusedlm.data.manifest import SPLITS, DamagedData, damaged, read_manifest, remedy, shard_files
from fusedlm.data.meter import Meter, ReportProgress, silent
from fusedlm.data.token_file import TokenFile
from fusedlm.data.tokenizer import Tokenizer, load_tokenizer
from fusedlm.files import sha256_file

_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Shard:
    tokens: TokenFile | np.ndarray  # (n_tokens,) uint16 or uint32; slices are arrays
    offsets: np.ndarray  # (n_documents + 1,) int64; the first is 0, the last n_tokens
    n_bytes: np.ndarray  # (n_documents,) int64


class TokenShards:
    """One split of prepared text.

    Attributes:
        n_tokens: tokens of all documents, including one end-of-text each.
        n_documents, n_bytes: documents, and UTF-8 bytes of their text.
        longest: text tokens of the longest document.
        sources: the shards of each of several sources, by name; empty: there is a single source.
    """

    def __init__(self, shards: list[Shard], sources: dict[str, "TokenShards"] | None = None):
        self.shards = shards
        self.sources = sources or {}
        self.n_tokens = sum(len(shard.tokens) for shard in shards)
        self.n_documents = sum(len(shard.n_bytes) for shard in shards)
        self.n_bytes = sum(int(shard.n_bytes.sum()) for shard in shards)
        self.longest = max((int(np.diff(shard.offsets).max()) - 1 for shard in shards), default=0)

    def documents(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yields each document in order: int64 tokens, end-of-text first, and the number of bytes of its text.

        Documents of several sources alternate so that any number of the first ones has the shares of the whole.
        """
        yield from self._alternating() if self.sources else self._in_order()

    def _alternating(self) -> Iterator[tuple[np.ndarray, int]]:
        left = {name: source.documents() for name, source in self.sources.items() if source.n_tokens}
        read = dict.fromkeys(left, 0)
        while left:
            name = min(left, key=lambda name: (read[name] / self.sources[name].n_tokens, name))
            document = next(left[name], None)
            if document is None:
                del left[name]
                continue
            read[name] += len(document[0])
            yield document

    def _in_order(self) -> Iterator[tuple[np.ndarray, int]]:
        for shard in self.shards:
            first, n = 0, len(shard.n_bytes)
            while first < n:
                # As many documents as one chunk holds: a read per document would be slow for short ones.
                start = int(shard.offsets[first])
                last = max(first + 1, int(np.searchsorted(shard.offsets, start + _CHUNK_TOKENS, side="right")) - 1)
                tokens = shard.tokens[start : int(shard.offsets[last])]
                for i in range(first, last):
                    low, high = shard.offsets[i] - start, shard.offsets[i + 1] - start
                    yield tokens[low:high].astype(np.int64), int(shard.n_bytes[i])
                first = last


@dataclass(frozen=True)
class PreparedData:
    directory: Path
    manifest: dict
    tokenizer: Tokenizer
    train: TokenShards
    validation: TokenShards

    def counts(self) -> dict[str, int]:
        """Sizes of the text, as environment.json of a run records them."""
        train, held_out = self.train, self.validation
        return {
            "documents": train.n_documents + held_out.n_documents,
            "bytes": train.n_bytes + held_out.n_bytes,
            "tokens": train.n_tokens + held_out.n_tokens,
            "training_tokens": train.n_tokens,
            "held_out_bytes": held_out.n_bytes,
        }


class ShardWriter:
    """Writes the documents of one split into shards of at most `shard_tokens` tokens; a longer document is a shard of
    its own. A shard holds documents of one source.

    Args:
        dtype: "<u2" or "<u4".
        first: number of the first shard.

    Attributes:
        sources: number of shards of each source.
    """

    def __init__(self, directory: Path, split: str, *, dtype: str, eot_id: int, shard_tokens: int, first: int = 0):
        self._directory, self._split, self._shard_tokens, self._first = directory, split, shard_tokens, first
        self._dtype = np.dtype(dtype)
        self._eot = np.asarray([eot_id], self._dtype).tobytes()
        self._file = None
        self._source: str | None = None
        self.shards: list[dict] = []
        self.sources: Counter = Counter()
        self.checksums: dict[str, str] = {}

    def add(self, ids: np.ndarray, n_bytes: int, source: str | None = None) -> None:
        """Append a document: its ids without end-of-text, the number of bytes of its text, and its source."""
        length = len(ids) + 1
        is_full = self._file is not None and self._offsets[-1] + length > self._shard_tokens
        if is_full or (self._file is not None and source != self._source):
            self._finish()
        self._source = source
        if self._file is None:
            self._name = f"{self._split}-{self._first + len(self.shards):05d}"
            self._file = open(self._directory / f"{self._name}.bin", "wb")  # noqa: SIM115 (open over many calls)
            self._digest = hashlib.sha256()
            self._offsets, self._n_bytes = array("q", [0]), array("q")
        for raw in (self._eot, ids.astype(self._dtype).tobytes()):
            self._file.write(raw)
            self._digest.update(raw)
        self._offsets.append(self._offsets[-1] + length)
        self._n_bytes.append(n_bytes)

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._finish()

    def summary(self) -> dict:
        """Counts of the split, for the manifest."""
        total = {key: sum(shard[key] for shard in self.shards) for key in ("documents", "tokens", "bytes")}
        return total | {"shards": self.shards}

    def _finish(self) -> None:
        self._file.close()
        self._file = None
        self.checksums[f"{self._name}.bin"] = self._digest.hexdigest()
        for kind, values in (("offsets", self._offsets), ("bytes", self._n_bytes)):
            path = self._directory / f"{self._name}.{kind}.npy"
            np.save(path, np.frombuffer(values, np.int64).astype("<i8"))
            self.checksums[path.name] = sha256_file(path)
        counts = {"documents": len(self._n_bytes), "tokens": self._offsets[-1], "bytes": sum(self._n_bytes)}
        self.shards.append({"name": self._name} | counts)
        self.sources[self._source] += 1


def open_prepared(
    directory: str | Path,
    *,
    fingerprint: str | None = None,
    verify: bool = True,
    progress: ReportProgress = silent,
) -> PreparedData:
    """Open a prepared folder.

    Sizes, the manifest's checksum, the tokenizer's fingerprint and where documents start are always checked.

    Args:
        fingerprint: of the text that the folder must hold; None: any.
        verify: also check the sha256 of every file and every token id, which reads all of them (about 1 GB/s per
            core where the processor has SHA instructions: two seconds per 10^9 uint16 tokens).
        progress: called as progress("verifying", bytes done, total).

    Raises:
        ValueError: the folder is missing, or holds another text, or its tokenizer loses held-out text.
        DamagedData: it is incomplete or damaged; names the file and what to do. A ValueError.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise ValueError(
            f"{directory} holds another text (fingerprint {manifest['fingerprint'][:12]}) than the requested one "
            f"({fingerprint[:12]}); folders were renamed or swapped: give each the name with its own fingerprint"
        )
    refuse_lossy(manifest, directory)
    _check_files(directory, manifest["files"])
    if verify:
        _verify(directory, manifest["files"], progress)
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        raise DamagedData(f"{error}; {remedy(directory)}") from None
    saved = manifest["tokenizer"]
    found = (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eot_id)
    if found != (saved["fingerprint"], saved["vocab_size"], saved["eot_id"]):
        raise damaged(directory, "tokenizer.meta.json", "is not the tokenizer that the shards were written with")
    train, validation = (_open_split(directory, manifest, split, verify) for split in SPLITS)
    return PreparedData(directory, manifest, tokenizer, train, validation)


def _check_files(directory: Path, files: dict) -> None:
    for name, entry in files.items():
        try:
            status = (directory / name).stat()
        except FileNotFoundError:
            raise damaged(directory, name, "is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise damaged(directory, name, "is not a file")
        if status.st_size != entry["bytes"]:
            raise damaged(directory, name, f"has {status.st_size} bytes instead of {entry['bytes']}")


def _verify(directory: Path, files: dict, progress: ReportProgress) -> None:
    meter = Meter(progress, "verifying", sum(entry["bytes"] for entry in files.values()))
    for name, entry in files.items():
        if sha256_file(directory / name, meter.advance) != entry["sha256"]:
            raise damaged(directory, name, "does not match its sha256")
    meter.finish()


def _open_split(directory: Path, manifest: dict, split: str, verify: bool) -> TokenShards:
    shards = []
    for entry in manifest["splits"][split]["shards"]:
        tokens_file, offsets_file, bytes_file = shard_files(entry["name"])
        offsets = _read_integers(directory, offsets_file, entry["documents"] + 1)
        if offsets[0] != 0 or offsets[-1] != entry["tokens"] or (np.diff(offsets) < 1).any():
            raise damaged(directory, offsets_file, f"does not divide {entry['tokens']} tokens into documents")
        n_bytes = _read_integers(directory, bytes_file, entry["documents"])
        if n_bytes.min() < 0 or n_bytes.sum() != entry["bytes"]:
            raise damaged(directory, bytes_file, f"does not add up to {entry['bytes']} bytes of text")
        tokens = TokenFile(
            directory / tokens_file,
            manifest["dtype"],
            entry["tokens"],
            manifest["tokenizer"]["vocab_size"],
            manifest["files"][tokens_file]["sha256"],
        )
        if verify:
            _check_documents(directory, tokens_file, tokens, offsets, manifest["tokenizer"]["eot_id"])
        shards.append(Shard(tokens, offsets, n_bytes))
    sources, first = {}, 0
    for entry in manifest.get("sources") or ():
        sources[entry["name"]] = TokenShards(shards[first : first + entry[split]])
        first += entry[split]
    return TokenShards(shards, sources if first else None)


def _check_documents(directory: Path, name: str, tokens: TokenFile, offsets: np.ndarray, eot_id: int) -> None:
    """Check that every id is in the vocabulary, and that end-of-text is where documents start and nowhere else."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        stop = start + _CHUNK_TOKENS
        low, high = np.searchsorted(offsets, [start, min(stop, len(tokens))])
        if not np.array_equal(np.flatnonzero(tokens[start:stop] == eot_id) + start, offsets[low:high]):
            raise damaged(directory, name, "does not have its end-of-text ids where its documents start")


def _read_integers(directory: Path, name: str, count: int) -> np.ndarray:
    """The int64 array of one dimension that `np.save` wrote. The header is compared, never evaluated."""
    with open(directory / name, "rb") as file:
        start = file.read(10)
        header = file.read(int.from_bytes(start[8:], "little"))
        expected = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({count},), }}"
        if start[:8] != b"\x93NUMPY\x01\x00" or header.strip() != expected.encode():
            raise damaged(directory, name, f"does not hold {count} integers of 64 bits")
        values = np.fromfile(file, "<i8", count)
    if len(values) != count:
        raise damaged(directory, name, f"holds {len(values)} instead of {count} integers")
    return values
