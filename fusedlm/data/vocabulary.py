"""How many tokens a tokenizer section asks for, before anything is prepared."""

from tokenizers import Tokenizer

from fusedlm.config.data import BPETokenizerConfig, BytesTokenizerConfig, TokenizerConfig
from fusedlm.data.tokenizer import ByteTokenizer


def planned_vocab_size(config: TokenizerConfig) -> int:
    """The vocabulary of a tokenizer section; a BPE trained on little text can end up with fewer.

    Raises:
        ValueError: a tokenizer file is missing or damaged.
    """
    if isinstance(config, BytesTokenizerConfig):
        return ByteTokenizer().vocab_size
    if isinstance(config, BPETokenizerConfig):
        return config.vocab_size
    try:
        return Tokenizer.from_file(config.path).get_vocab_size()
    except Exception as error:  # tokenizers raises plain Exception for whatever is wrong with the file
        raise ValueError(f"data.tokenizer.path={config.path}: {error}; to plan without it: --vocab-size N") from None
