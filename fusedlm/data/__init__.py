"""From text to batches of tokens: sources, tokenizers, preparation into shards, the loader."""

from fusedlm.data.loader import Batch, Loader
from fusedlm.data.preparation import prepare
from fusedlm.data.shards import PreparedData, TokenShards, open_prepared
from fusedlm.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batch", "Loader", "PreparedData", "TokenShards", "Tokenizer", "load_tokenizer", "open_prepared", "prepare"]
