"""UTF-8 text from files: what is text, and lines.

One rule holds for all text that is read: a byte-order mark at the start of a file is no part of the text, and NUL is
refused, because a file that holds it is binary, UTF-16 or damaged.
"""

from collections.abc import Iterator
from pathlib import Path

from fusedlm.data.compression import chunks, is_compressed

BOM = b"\xef\xbb\xbf"
_NUL = "is NUL, which is not text; convert the file or remove it"
_UTF16 = "; convert it to UTF-8, such as with iconv -f {encoding} -t UTF-8"
_MARKS = (  # the longer first
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def read_text_file(path: Path) -> str:
    """The text of a file, without its byte-order mark.

    Raises:
        ValueError: it is damaged, or not UTF-8; names the file and the byte.
    """
    return decode(b"".join(chunks(path)), path, 0)


def lines(path: Path) -> Iterator[bytes]:
    """Yields lines with their "\\n", which the last one may lack."""
    rest = []
    for chunk in chunks(path):
        *complete, last = chunk.split(b"\n")
        for line in complete:
            rest.append(line)
            yield b"".join(rest) + b"\n"
            rest = []
        rest.append(last)
    if tail := b"".join(rest):
        yield tail


def decode(raw: bytes, path: Path, offset: int) -> str:
    """Text of the bytes that start at `offset` in the (decompressed) file.

    Raises:
        ValueError: it is not UTF-8 or holds NUL; names the file and the byte.
    """
    unit = "decompressed byte" if is_compressed(path) else "byte"
    if offset == 0:
        for mark, encoding in _MARKS:
            if raw.startswith(mark):
                shown = " ".join(f"{byte:02x}" for byte in mark)
                raise ValueError(f"{path}: {encoding} (byte-order mark {shown}){_UTF16.format(encoding=encoding)}")
    if (nul := raw.find(0)) >= 0:
        if offset == 0 and (encoding := _unmarked_utf16(raw)):
            raise ValueError(f"{path}: looks like {encoding}{_UTF16.format(encoding=encoding)}")
        raise ValueError(f"{path}: {unit} {offset + nul} {_NUL}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"{unit} {offset + error.start} (0x{raw[error.start]:02x})"
        raise ValueError(f"{path}: {at} is not UTF-8; convert the file or remove it") from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def refuse_nul(text: str, place: str) -> None:
    """The rule of `decode` for text that was escaped or is no text file.

    Raises:
        ValueError: the text holds NUL.
    """
    if (nul := text.find("\0")) >= 0:
        raise ValueError(f"{place}: character {nul} {_NUL}")


def _unmarked_utf16(raw: bytes) -> str | None:
    """The encoding, if every second byte of the start is zero, as in UTF-16 of Latin letters."""
    start = raw[:1024]
    for first, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros, others = start[first::2].count(0), start[1 - first :: 2].count(0)
        if len(start) >= 4 and 10 * zeros >= 9 * len(start[first::2]) and 10 * others <= len(start):
            return encoding
    return None
