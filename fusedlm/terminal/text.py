"""Text from keys, file names, documents and other programs, made safe to show."""

import codecs
import re

# C0 but tab and line feed, DEL, C1; the bidirectional controls; line and paragraph separators; lone surrogates, which
# stand for bytes of a file name that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What the display itself uses outside of ASCII, for terminals that cannot show it.
_ASCII = {ord(c): "-" for c in "─━╌╶╴╸╺–—−"} | {ord(c): "|" for c in "│┃"} | {0x2026: "...", 0xD7: "x", 0x2192: "->"}
ENCODE_ERRORS = "fusedlm.terminal"


def printable(text: str) -> str:
    """The text with control characters and bidirectional marks as \\xNN or \\uNNNN; tabs and line feeds stay."""
    return _UNSAFE.sub(lambda found: _escaped(found[0]), text)


def one_line(text: str) -> str:
    """The text as one printable line: white space, line ends included, becomes single spaces."""
    return printable(" ".join(text.split()))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as os.fsdecode gives it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Error handler of an encoding: a likeness in ASCII if there is one, else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_ASCII.get(ord(c)) or _escaped(c) for c in lost), error.end


codecs.register_error(ENCODE_ERRORS, _replace)
