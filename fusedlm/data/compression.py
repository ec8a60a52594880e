"""Reading .gz, .xz and .zst files of one or several members. Unlike in the modules of the standard library, what
follows the last member is an error unless it is zeros: a member with a damaged header must not be lost in silence."""

import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

_CHUNK_BYTES = 1 << 20
_COMPRESSED_BYTES = 1 << 12  # per call, which returns all that these bytes hold: up to 30,000 times as much
_LONGEST_WINDOW = 1 << 31  # of `zstd --long=31`
_DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj(),
}
COMPRESSED = tuple(_DECOMPRESSORS)


def is_compressed(path: Path) -> bool:
    """By the name."""
    return path.suffix.lower() in COMPRESSED


def chunks(path: Path) -> Iterator[bytes]:
    """Yields the content of a file, decompressed if its name says so.

    Raises:
        ValueError: a compressed file is empty, truncated or damaged.
    """
    with path.open("rb") as file:
        if not is_compressed(path):
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
            return
        start = file.read(_COMPRESSED_BYTES)
        if not start:
            raise ValueError(f"{path}: empty, not a {path.suffix} file; compress it again")
        try:
            yield from _members(start, file, _DECOMPRESSORS[path.suffix.lower()])
        except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: truncated or damaged {path.suffix} file ({what})") from None


def _members(chunk: bytes, file: BinaryIO, new: Callable) -> Iterator[bytes]:
    member = new()
    while chunk:
        yield member.decompress(chunk)
        chunk = member.unused_data.lstrip(b"\0") if member.eof else b""  # zeros pad tapes and xz
        while not chunk and (more := file.read(_COMPRESSED_BYTES)):
            chunk = more.lstrip(b"\0") if member.eof else more
        if chunk and member.eof:
            member = new()
    if not member.eof:
        raise EOFError("it ends too early")
