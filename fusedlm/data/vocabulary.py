"""The vocabulary size of a recipe, before its text is prepared."""

from fusedlm.config.data import BPETokenizerConfig, BytesTokenizerConfig, TokenizerConfig
from fusedlm.data.tokenizer import ByteTokenizer, read_tokenizer_file


def planned_vocab_size(config: TokenizerConfig) -> int:
    """Vocabulary size of a tokenizer section; a BPE trained on little text can have fewer ids.

    Raises:
        ValueError: a tokenizer file is missing, damaged, or lacks its end-of-text token.
    """
    if isinstance(config, BytesTokenizerConfig):
        return ByteTokenizer().vocab_size
    if isinstance(config, BPETokenizerConfig):
        return config.vocab_size
    try:
        return read_tokenizer_file(config.path, config.end_of_text).vocab_size
    except ValueError as error:
        raise ValueError(f"{error}; to plan without it, give --vocab-size N") from None
