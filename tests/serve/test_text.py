"""Text while it is generated: stop strings across tokens, and characters that are complete."""

import random

import pytest

from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.serve.text import SequenceText, token_text

TOKENIZER = ByteTokenizer()


def release(text: bytes, stop=()):
    stream, pieces = SequenceText(TOKENIZER, [], tuple(stop)), []
    for byte in text:
        pieces.append(stream.add(byte))
        if stream.stopped:
            return "".join(pieces), True, pieces
    pieces.append(stream.finish())
    return "".join(pieces), stream.stopped, pieces


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two", [". "], "one"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("no stop here", ["stop!", "ere?"], "no stop here"),
        ("ends with sto", ["stop"], "ends with sto"),
        ("both ab and b", ["b and", "ab"], "both "),
        ("é à l'été", ["été"], "é à l'"),
        ("x", ["x"], ""),
        ("日本語のテキスト", ["のテ"], "日本語"),
    ],
)
def test_text_ends_before_a_stop_string(text, stop, expected):
    found, stopped, pieces = release(text.encode(), stop)
    assert found == expected and stopped == (expected != text)
    assert all(piece.encode() for piece in pieces if piece)  # valid Unicode


def test_any_text_and_stop_give_what_a_search_gives():
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices("abé€", k=generator.randrange(30)))
        stop = ["".join(generator.choices("abé€", k=generator.randrange(1, 5))) for _ in range(generator.randrange(3))]
        places = [place for s in stop if (place := text.find(s)) >= 0]
        found, stopped, _ = release(text.encode(), stop)
        assert stopped == bool(places)
        # The first one that is complete ends the text, and of these the one that begins first.
        ends = [text.find(s) + len(s) for s in stop if s in text]
        expected = text if not ends else text[: min(text.find(s) for s in stop if s in text[: min(ends)])]
        assert found == expected


def test_bytes_that_are_no_character_wait_for_the_end():
    assert release(b"a\xf0\x9f\x98")[0] == "a\ufffd"
    assert [p for p in release("a😀b".encode())[2] if p] == ["a", "😀", "b"]
    assert token_text(TOKENIZER, 0xC3) == "bytes:\\xc3" and token_text(TOKENIZER, 65) == "A"
