"""Text that cannot drive a terminal."""

import pytest

from fusedlm.terminal import one_line, printable
from fusedlm.terminal.screen import plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 日本 😀 a\u200db", "naïve 日本 😀 a\u200db"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\x1b[31mred\x07\r\x00", r"\x1b[31mred\x07\x0d\x00"),
        ("\x7f\x80\x9b2J", r"\x7f\x80\x9b2J"),
        ("a\u202eb\u2066c\u200fd\u061ce", r"a\u202eb\u2066c\u200fd\u061ce"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\udc9b\ud800", r"\x9b\ud800"),  # a byte of a file name, and half a pair
    ],
)
def test_control_characters_and_bidirectional_marks_are_escaped(text: str, shown: str):
    assert printable(text) == shown


def test_one_line():
    assert one_line("a\n  b\r\nc\x1b[2J\u2028d\x85e") == r"a b c\x1b[2J d e"


def test_plain_text_is_no_markup():
    assert plain("[red]a[/red] :smile:\n\x1b").plain == r"[red]a[/red] :smile:\x0a\x1b"
