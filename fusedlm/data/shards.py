"""Token shards on disk: written once, verified on opening, memory-mapped.

A prepared folder holds, for each shard of a split (`train`, `validation`),

    train-00000.bin           token ids, uint16 (vocabularies up to 65536) or uint32, little-endian
    train-00000.offsets.npy   int64 (documents + 1): start of each document, and the end of the last
    train-00000.bytes.npy     int64 (documents): UTF-8 bytes of each document's text

the tokenizer, and manifest.json: counts, the size and sha256 of every other file, and a checksum of itself. A
document lies in one shard, as [end-of-text, its tokens...].
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusedlm.data.meter import Meter, ReportProgress, silent
from fusedlm.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = "fusedlm prepared data"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32, memory-mapped
    offsets: np.ndarray  # (n_documents + 1,) int64; the first is 0, the last n_tokens
    n_bytes: np.ndarray  # (n_documents,) int64


class TokenShards:
    """One split of prepared text.

    Attributes:
        n_tokens: tokens of all documents, including one end-of-text each.
        n_documents, n_bytes: documents, and UTF-8 bytes of their text.
    """

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.n_tokens = sum(len(shard.tokens) for shard in shards)
        self.n_documents = sum(len(shard.n_bytes) for shard in shards)
        self.n_bytes = sum(int(shard.n_bytes.sum()) for shard in shards)

    def documents(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yields each document in order: int64 tokens, end-of-text first, and the number of bytes of its text."""
        for shard in self.shards:
            for i, n_bytes in enumerate(shard.n_bytes.tolist()):
                yield shard.tokens[shard.offsets[i] : shard.offsets[i + 1]].astype(np.int64), n_bytes


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
    its own.

    Args:
        dtype: "<u2" or "<u4".
    """

    def __init__(self, directory: Path, split: str, *, dtype: str, eot_id: int, shard_tokens: int):
        self._directory, self._split, self._shard_tokens = directory, split, shard_tokens
        self._dtype = np.dtype(dtype)
        self._eot = np.asarray([eot_id], self._dtype).tobytes()
        self._file = None
        self.shards: list[dict] = []
        self.checksums: dict[str, str] = {}

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        """Append a document: its ids without end-of-text, and the number of bytes of its text."""
        length = len(ids) + 1
        if self._file is not None and self._offsets[-1] + length > self._shard_tokens:
            self._finish()
        if self._file is None:
            self._name = f"{self._split}-{len(self.shards):05d}"
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


def write_manifest(directory: Path, manifest: dict, checksums: dict[str, str]) -> None:
    """Write manifest.json: `manifest`, the size and sha256 of the named files, and a checksum of both."""
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": checksum}
        for name, checksum in sorted(checksums.items())
    }
    content = {"format": FORMAT, "version": FORMAT_VERSION} | manifest | {"files": files}
    content["checksum"] = _manifest_checksum(content)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def open_prepared(directory: str | Path, *, verify: bool = True, progress: ReportProgress = silent) -> PreparedData:
    """Open a prepared folder.

    Sizes, the manifest's checksum and the tokenizer's fingerprint are always checked.

    Args:
        verify: also check the sha256 of every file, which reads all of them (about 1.8 GB/s per core where the
            processor has SHA instructions: a second per 10^9 uint16 tokens).
        progress: called as progress("verifying", bytes done, total).

    Raises:
        ValueError: the folder is missing, incomplete or damaged; names the file and what to do.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    for name, entry in manifest["files"].items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            raise _damaged(directory / name, "is missing") from None
        if size != entry["bytes"]:
            raise _damaged(directory / name, f"has {size} bytes instead of {entry['bytes']}")
    if verify:
        _verify(directory, manifest["files"], progress)
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        raise ValueError(f"{error}; {_remedy(directory)}") from None
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise _damaged(directory / "tokenizer.meta.json", "is not the tokenizer that the shards were written with")
    train, validation = (_open_split(directory, manifest, split) for split in SPLITS)
    return PreparedData(directory, manifest, tokenizer, train, validation)


def sha256_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """sha256 (hex) of a file; `advance` is called with the number of bytes of each read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def _read_manifest(directory: Path) -> dict:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; run `fusedlm data prepare` first")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(path, f"is not a manifest of {FORMAT}")
    if manifest.get("version") != FORMAT_VERSION:
        raise _damaged(path, f"has format version {manifest.get('version')!r}; this fusedlm reads {FORMAT_VERSION}")
    if manifest.get("checksum") != _manifest_checksum(manifest):
        raise _damaged(path, "does not match its own checksum")
    return manifest


def _manifest_checksum(manifest: dict) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _verify(directory: Path, files: dict, progress: ReportProgress) -> None:
    meter = Meter(progress, "verifying", sum(entry["bytes"] for entry in files.values()))
    for name, entry in files.items():
        if sha256_file(directory / name, meter.advance) != entry["sha256"]:
            raise _damaged(directory / name, "does not match its sha256")
    meter.finish()


def _open_split(directory: Path, manifest: dict, split: str) -> TokenShards:
    dtype = np.dtype(manifest["dtype"])
    shards = []
    for entry in manifest["splits"][split]["shards"]:
        path = directory / f"{entry['name']}.bin"
        try:
            tokens = np.memmap(path, dtype, mode="r")
            offsets = np.load(directory / f"{entry['name']}.offsets.npy", mmap_mode="r")
            n_bytes = np.load(directory / f"{entry['name']}.bytes.npy", mmap_mode="r")
            agree = (len(tokens), len(n_bytes), int(offsets[-1])) == (
                entry["tokens"],
                entry["documents"],
                entry["tokens"],
            )
        except (ValueError, IndexError):
            agree = False
        if not agree:
            raise _damaged(path, "or its offsets differ from the manifest")
        shards.append(Shard(tokens, offsets, n_bytes))
    return TokenShards(shards)


def _remedy(directory: Path) -> str:
    return f"delete the folder {directory} and prepare again"


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}; {_remedy(path.parent)}")
