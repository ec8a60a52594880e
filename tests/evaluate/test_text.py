"""Any text as a document."""

import pytest

from fusedlm.data.tokenizer import ByteTokenizer, train_bpe
from fusedlm.evaluate import text_documents


@pytest.mark.parametrize("text", ["a", "naïve 日本語 🙂", " \r\n\t\0x", "<|endoftext|>", "\ufeffmark"])
def test_the_full_text_is_one_document(text):
    for tokenizer in (ByteTokenizer(), train_bpe(["the union of the states " * 9], 270)):
        [(tokens, n_bytes)] = text_documents(text, tokenizer)
        assert tokens[0] == tokenizer.eot_id and tokenizer.eot_id not in tokens[1:]
        assert n_bytes == len(text.encode()) and tokenizer.decode_bytes(tokens) == text.encode()


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        text_documents("", ByteTokenizer())


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match="surrogate at character 2"):
        text_documents("ab\udc80", ByteTokenizer())


def test_a_tokenizer_that_changes_the_text_is_refused():
    class Lower(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.lower())

    class Cut(ByteTokenizer):
        def encode(self, text):
            return super().encode(text)[:-1]

    with pytest.raises(ValueError, match="at byte 3: 'abcDef' becomes 'abcdef'; bits per byte need"):
        text_documents("abcDef", Lower())
    with pytest.raises(ValueError, match="at byte 5: 'abcDef' becomes 'abcDe'"):
        text_documents("abcDef", Cut())
