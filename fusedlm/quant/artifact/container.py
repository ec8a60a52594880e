"""The bytes of an artifact: a prefix, the compressed header, then its sections one after the other, without gaps."""

import hashlib
import struct
from pathlib import Path

import torch

from fusedlm.quant.artifact.coders import compress, decompress, fits
from fusedlm.quant.artifact.table import Header, parse
from fusedlm.quant.integer import IntegerMatrix

MAGIC = b"\x89FLM\r\n\x1a\n"  # as in PNG: a transfer that changes line ends or the eighth bit shows at once
VERSION = 1
SUFFIX = ".flm"

_PREFIX = struct.Struct("<8sHII")  # magic, version, bytes of the compressed header, bytes of the header
_DIGEST_BYTES = 16
_START = _PREFIX.size + _DIGEST_BYTES


class DamagedArtifact(ValueError):
    """A file that is no artifact, or is not what was written; the message names the file, the part and the check."""


def check_of(content: bytes) -> str:
    """Of a section, 16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


class ContentDigest:
    """Of decoded tensors: what a reader has is what the writer had, however it was coded."""

    def __init__(self):
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, name: str, tensor: IntegerMatrix | torch.Tensor) -> None:
        if isinstance(tensor, IntegerMatrix):
            self._add(f"{name} {tensor.bits} {tensor.group}", tensor.codes)
            self._add("scales", tensor.scales)
        else:
            self._add(name, tensor)

    def _add(self, label: str, tensor: torch.Tensor) -> None:
        self._digest.update(f"{label} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        self._digest.update(tensor_bytes(tensor))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor on the CPU, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assemble(header: Header, sections: list[bytes]) -> bytes:
    """The bytes of the file. Sections are in the order of `Header.sections`."""
    raw = header.dump()
    coded = compress(raw, ("lzma",))["lzma"]
    prefix = _PREFIX.pack(MAGIC, VERSION, len(coded), len(raw))
    return b"".join([prefix, _digest(prefix + coded), coded, *sections])


def is_artifact(path: Path) -> bool:
    """Whether a path is that of a file, which a run folder is not."""
    return path.is_file()


class Container:
    """An artifact on the disk: `header`, its tables, and `section`, the bytes of one of its sections.

    Raises:
        DamagedArtifact: it is no artifact, or its header is damaged.
        OSError: the system cannot read it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self.path.open("rb") as file:
            start = file.read(_START)
            self._check_prefix(start)
            self._content = start + file.read()
        self.n_bytes = len(self._content)
        _, _, n_coded, n_raw = _PREFIX.unpack(start[: _PREFIX.size])
        coded = self._content[_START : _START + n_coded]
        if len(coded) < n_coded:
            raise self.damage("header", f"{n_coded} bytes, the file has {len(coded)}; it is truncated")
        if _digest(start[: _PREFIX.size] + coded) != start[_PREFIX.size :]:
            raise self.damage("header", "its checksum differs")
        try:
            if not fits(n_raw, n_coded):
                raise ValueError(f"{n_coded} bytes cannot hold {n_raw}")
            self.header = parse(decompress(coded, "lzma", n_raw))
        except ValueError as error:
            raise self.damage("header", str(error)) from None
        self._sections, offset = {}, _START + n_coded
        self.header_bytes = offset
        for name, entry in self.header.sections():
            self._sections[name] = offset, entry.bytes, entry.check
            offset += entry.bytes
        if offset > self.n_bytes:
            raise self.damage("file", f"{self.n_bytes} bytes, its sections have {offset}; it is truncated")
        if offset < self.n_bytes:
            raise self.damage("file", f"{self.n_bytes - offset} bytes follow its last section")

    def _check_prefix(self, start: bytes) -> None:
        if start[: len(MAGIC)] != MAGIC:
            raise self.damage("file", "its first bytes are not those of an artifact of fusedlm pack")
        if len(start) < _START:
            raise self.damage("file", f"{len(start)} bytes are too few; it is truncated")
        version = _PREFIX.unpack(start[: _PREFIX.size])[1]
        if version != VERSION:
            raise self.damage("file", f"its format is version {version}, this one reads {VERSION}; pack the run again")

    def damage(self, part: str, problem: str) -> DamagedArtifact:
        return DamagedArtifact(f"{self.path}: {part}: {problem}")

    def section(self, name: str) -> bytes:
        """The bytes of a section, checked. Raises DamagedArtifact."""
        first, n_bytes, check = self._sections[name]
        found = self._content[first : first + n_bytes]
        if check_of(found) != check:
            raise self.damage(name, "its checksum differs")
        return found

    def verify(self) -> None:
        """Check all sections. Raises DamagedArtifact with the first that is damaged."""
        for name in self._sections:
            self.section(name)

    def offset(self, name: str) -> int:
        """Where a section begins in the file."""
        return self._sections[name][0]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
