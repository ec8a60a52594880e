"""The planned vocabulary is that of the tokenizer that preparation makes."""

import pytest
import tokenizers
from tokenizers import models

from fusedlm.config.data import (
    BPETokenizerConfig,
    BytesTokenizerConfig,
    DataConfig,
    FileTokenizerConfig,
    TextSource,
)
from fusedlm.data.preparation import prepare
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


def test_a_stated_size_replaces_a_missing_file_and_is_checked_against_one_that_exists(tmp_path):
    path = tmp_path / "tokenizer.json"
    config = FileTokenizerConfig(path=str(path), end_of_text="</s>", vocab_size=50257)
    assert planned_vocab_size(config) == 50257
    tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")).save(str(path))
    assert planned_vocab_size(config.model_copy(update={"vocab_size": 2})) == 2
    with pytest.raises(ValueError, match="data.tokenizer.vocab_size=50257: .* has 2; state that"):
        planned_vocab_size(config)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        planned_vocab_size(config)
    text = tmp_path / "text.txt"
    text.write_text("</s> " * 9)
    with pytest.raises(ValueError, match="vocab_size=50257"):
        tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")).save(str(path))
        prepare(DataConfig(source=TextSource(path=str(text)), tokenizer=config, dir=str(tmp_path / "prepared")))
