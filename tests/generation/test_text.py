"""Pieces of valid text from tokens."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fusedlm.data.tokenizer import ByteTokenizer, SubwordTokenizer, train_bpe
from fusedlm.generation.text import TextStream

TEXTS = ["naïve", "日本語 and 🙂🙃.", "a \ufffd b", "one two  three\n"]


def sentence_piece():
    """Words with a leading ▁, which the decoder turns into a space and drops at the start; other text is bytes."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "▁one": 3, "▁two": 4, "o": 5, "ne": 6}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return SubwordTokenizer(model.to_str(), "</s>"), vocabulary


def stream(tokenizer, context, ids):
    text = TextStream(tokenizer, context)
    return [piece for piece in (*(text.add(i) for i in ids), text.finish()) if piece]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text):
    for tokenizer in (ByteTokenizer(), train_bpe(TEXTS * 2, 270)):
        pieces = stream(tokenizer, [tokenizer.eot_id], tokenizer.encode(text))
        assert "".join(pieces) == text
        assert all(piece.encode() for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    assert stream(ByteTokenizer(), [256], list("é🙂".encode())) == ["é", "🙂"]


def test_spaces_that_a_decoder_drops_at_the_start_are_kept_between_words():
    tokenizer, vocabulary = sentence_piece()
    one, two = vocabulary["▁one"], vocabulary["▁two"]
    assert stream(tokenizer, [tokenizer.eot_id], [one, two, one]) == ["one", " two", " one"]
    assert stream(tokenizer, [tokenizer.eot_id, one], [two, vocabulary["ne"]]) == [" two", "ne"]


def test_a_character_of_several_byte_tokens_is_one_piece():
    tokenizer, vocabulary = sentence_piece()
    ids = [vocabulary["▁one"], *(vocabulary[f"<0x{byte:02X}>"] for byte in "日🙂".encode()), vocabulary["▁two"]]
    assert stream(tokenizer, [tokenizer.eot_id], ids) == ["one", "日", "🙂", " two"]


def test_an_incomplete_character_at_the_end_is_replaced():
    tokenizer, vocabulary = sentence_piece()
    pieces = stream(tokenizer, [tokenizer.eot_id], [vocabulary["▁one"], vocabulary["<0xE6>"], vocabulary["<0x97>"]])
    assert pieces[0] == "one" and set("".join(pieces[1:])) == {"\ufffd"}
    assert stream(ByteTokenizer(), [256], [0x61, 0xE6, 0x97]) == ["a", "\ufffd"]
