"""Coders of bytes: each part of an artifact has the one that makes it smallest."""

import importlib.util
import lzma
from collections.abc import Sequence

import zstandard

REQUIRED = ("raw", "lzma", "zstd")  # a file with these can be read wherever the package is installed
OPTIONAL = ("brotli",)

# A part holds at most this many bytes per byte of the file, and a few more: what is read cannot ask for more memory.
LARGEST_RATIO, SPARE_BYTES = 8192, 1 << 16

_ZSTD_WINDOW = 1 << 27


def _lzma_filters(size: int) -> list[dict]:
    """Of data of a size, which both sides know: a dictionary that is larger takes memory and time."""
    dictionary = 1 << min(max(size.bit_length(), 12), 24)
    return [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]


def why_not(coder: str) -> str | None:
    """Why a coder cannot be used here; None: it can."""
    if coder in OPTIONAL and importlib.util.find_spec(coder) is None:
        return f"the package {coder} is not installed; pip install {coder}"
    return None


def fits(size: int, coded: int) -> bool:
    """Whether a part of `coded` bytes may hold `size` bytes."""
    return size <= LARGEST_RATIO * coded + SPARE_BYTES


def compress(data: bytes, coders: Sequence[str]) -> dict[str, bytes]:
    """The bytes by coder, of those whose result may be read again."""
    found = {coder: _compress(data, coder) for coder in coders}
    return {coder: coded for coder, coded in found.items() if fits(len(data), len(coded))}


def smallest(found: dict[str, bytes]) -> tuple[str, bytes]:
    """(coder, bytes); the first of several that are as small."""
    return min(found.items(), key=lambda item: len(item[1]))


def _compress(data: bytes, coder: str) -> bytes:
    if coder == "raw":
        return data
    if coder == "lzma":
        return lzma.compress(data, lzma.FORMAT_RAW, filters=_lzma_filters(len(data)))
    if coder == "zstd":
        parameters = zstandard.ZstdCompressionParameters.from_level(
            22, source_size=len(data), write_content_size=False, write_checksum=False, write_dict_id=False
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(data)
    import brotli

    return brotli.compress(data, quality=11, lgwin=24)


def decompress(coded: bytes, coder: str, size: int) -> bytes:
    """The bytes of a part, whose number is known.

    Raises:
        ValueError: they are damaged or not as many, or the coder is not installed here.
    """
    if reason := why_not(coder):
        raise ValueError(reason)
    try:
        data = _decompress(coded, coder, size)
    except (lzma.LZMAError, zstandard.ZstdError, EOFError, MemoryError) as error:
        raise ValueError(f"not what {coder} wrote ({' '.join(str(error).split())[:100]})") from None
    if len(data) != size:
        many = "more" if len(data) > size else len(data)
        raise ValueError(f"holds {many} bytes, not {size}")
    return data


def _decompress(coded: bytes, coder: str, size: int) -> bytes:
    """The bytes, at most one more than their number is, whatever the compressed bytes ask for."""
    limit = size + 1
    if coder == "raw":
        return coded
    if coder == "lzma":
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(size)).decompress(coded, limit)
    if coder == "zstd":
        with zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(coded) as reader:
            return reader.read(limit)
    import brotli

    try:
        return brotli.Decompressor().process(coded, output_buffer_limit=limit)
    except (brotli.error, TypeError) as error:
        raise ValueError(f"not what brotli wrote, or brotli is older than 1.2 ({error})") from None


def planes(data: bytes, width: int) -> bytes:
    """Elements of `width` bytes as the first bytes of all, then the second ones: these resemble each other."""
    return b"".join(data[byte::width] for byte in range(width))


def from_planes(data: bytes, width: int) -> bytes:
    """The inverse of `planes`."""
    result = bytearray(len(data))
    n = len(data) // width
    for byte in range(width):
        result[byte::width] = data[byte * n : (byte + 1) * n]
    return bytes(result)
