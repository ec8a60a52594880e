"""The first tokens of documents, and the bytes of exactly these tokens."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusedlm.data.tokenizer import ByteTokenizer, SubwordTokenizer, train_bpe
from fusedlm.evaluate import first_tokens, text_documents

TEXTS = ["The union of naïve states; the union.", "日本語 🙂 the states", "of these"]


def byte_fallback() -> SubwordTokenizer:
    """Words and, for what is not among them, one token per byte, which only decode together."""
    pieces = ["▁The", "▁the", "▁union", "▁of", "▁states", ";", ".", "▁", "<eot>"]
    vocabulary = {piece: i for i, piece in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *pieces])}
    unigram = models.Unigram([(piece, -1.0) for piece in vocabulary], 0, byte_fallback=True)
    tokenizer = Tokenizer(unigram)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")],
    )
    return SubwordTokenizer(tokenizer.to_str(), "<eot>")


TOKENIZERS = {"bytes": ByteTokenizer, "bpe": lambda: train_bpe(TEXTS, 280), "byte fallback": byte_fallback}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture
def documents(tokenizer):
    return [document for text in TEXTS for document in text_documents(text, tokenizer)]


def test_every_budget_is_kept_with_the_bytes_of_its_tokens(documents, tokenizer):
    text = "".join(TEXTS).encode()
    total = sum(len(tokens) - 1 for tokens, _ in documents)
    exact = 0
    for budget in range(4, total + 2):
        found = list(first_tokens(documents, budget, tokenizer))
        n_tokens = sum(len(tokens) - 1 for tokens, _ in found)
        assert budget - 4 < n_tokens <= budget or n_tokens == total
        for (tokens, n_bytes), (full, _) in zip(found, documents, strict=False):
            assert np.array_equal(tokens, full[: len(tokens)])
            assert len(tokenizer.decode_bytes(tokens[1:])) == n_bytes
        decoded = b"".join(tokenizer.decode_bytes(tokens[1:]) for tokens, _ in found)
        assert text.startswith(decoded) and sum(n_bytes for _, n_bytes in found) == len(decoded)
        exact += n_tokens == min(budget, total)
    assert exact > total / 2


def test_bytes_can_be_cut_inside_a_character():
    documents = text_documents("é", ByteTokenizer())
    assert [(tokens.tolist(), n) for tokens, n in first_tokens(documents, 1, ByteTokenizer())] == [([256, 0xC3], 1)]


def test_characters_are_not_cut():
    tokenizer = byte_fallback()
    documents = text_documents("; 日本", tokenizer)
    lengths = [sum(n for _, n in first_tokens(documents, budget, tokenizer)) for budget in range(1, 9)]
    assert lengths == [1, 2, 2, 2, 5, 5, 5, 8]
    with pytest.raises(ValueError, match="max_tokens=2: the first character of the text has more tokens"):
        list(first_tokens(text_documents("日", tokenizer), 2, tokenizer))


def test_without_a_budget_documents_are_passed_on(documents, tokenizer):
    assert [id(tokens) for tokens, _ in first_tokens(documents, None, tokenizer)] == [id(t) for t, _ in documents]


def test_documents_after_the_budget_are_not_read():
    def stream():
        yield np.array([256, 65, 66]), 2
        raise AssertionError("read past the budget")

    for budget in (1, 2):
        assert sum(len(tokens) - 1 for tokens, _ in first_tokens(stream(), budget, ByteTokenizer())) == budget


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        list(first_tokens([], 0, ByteTokenizer()))
