"""The vocabulary size of a recipe, before its text is prepared."""

from pathlib import Path

from fusedlm.config.data import BPETokenizerConfig, BytesTokenizerConfig, FileTokenizerConfig, TokenizerConfig
from fusedlm.data.tokenizer import ByteTokenizer, read_tokenizer_file


def planned_vocab_size(config: TokenizerConfig) -> int:
    """Vocabulary size of a tokenizer section; a BPE trained on little text can have fewer ids. That of a tokenizer file
    is the stated one if the file does not exist.

    Raises:
        ValueError: a tokenizer file is missing, damaged, or lacks its end-of-text token.
    """
    if isinstance(config, BytesTokenizerConfig):
        return ByteTokenizer().vocab_size
    if isinstance(config, BPETokenizerConfig):
        return config.vocab_size
    if config.vocab_size is not None and lacks_file(config):
        return config.vocab_size
    try:
        tokenizer = read_tokenizer_file(config.path, config.end_of_text)
    except ValueError as error:
        raise ValueError(f"{error}; to plan without it, give --vocab-size N") from None
    check_vocab_size(config, tokenizer.vocab_size)
    return tokenizer.vocab_size


def lacks_file(config: TokenizerConfig) -> bool:
    """Whether a tokenizer section names a file that does not exist."""
    return isinstance(config, FileTokenizerConfig) and not Path(config.path).expanduser().exists()


def check_vocab_size(config: FileTokenizerConfig, vocab_size: int) -> None:
    """Raises ValueError if the recipe states another vocabulary size than the file has."""
    if config.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"data.tokenizer.vocab_size={config.vocab_size}: {config.path} has {vocab_size}; state that, or name "
            "another file"
        )
