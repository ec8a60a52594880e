"""Text to tokens: sources, tokenizers, preparation into shards, and the loader that reads them."""

from fusedlm.data.loader import Batch, Loader
from fusedlm.data.preparation import prepare
from fusedlm.data.shards import PreparedData, TokenShards, open_prepared
from fusedlm.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batch", "Loader", "PreparedData", "TokenShards", "Tokenizer", "load_tokenizer", "open_prepared", "prepare"]
