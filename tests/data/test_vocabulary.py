"""The planned vocabulary is that of the tokenizer that preparation makes."""

import pytest
import tokenizers
from tokenizers import models

from fusedlm.config.data import BPETokenizerConfig, BytesTokenizerConfig, FileTokenizerConfig
from fusedlm.data.tokenizer import ByteTokenizer, read_tokenizer_file
from fusedlm.data.vocabulary import planned_vocab_size


def test_bytes_and_bpe():
    assert planned_vocab_size(BytesTokenizerConfig()) == ByteTokenizer().vocab_size
    assert planned_vocab_size(BPETokenizerConfig(vocab_size=300)) == 300


def test_a_file_whose_ids_have_gaps(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 7, "</s>": 3}, unk_token="<unk>")).save(str(path))
    config = FileTokenizerConfig(path=str(path), end_of_text="</s>")
    assert planned_vocab_size(config) == read_tokenizer_file(path, "</s>").vocab_size == 8
    with pytest.raises(ValueError, match="end-of-text token.* give --vocab-size N$"):
        planned_vocab_size(FileTokenizerConfig(path=str(path), end_of_text="</a>"))
