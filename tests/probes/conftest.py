"""Text, tokenizers, documents, and the arguments for the CPU."""

import numpy as np
import pytest
import torch

from fusedlm.data.tokenizer import ByteTokenizer, train_bpe
from fusedlm.evaluate import text_documents

WORDS = "the union of these states naïve people 日本語 and their Congress, which 🙂 has\nmet in the year 1789;"


@pytest.fixture(scope="session")
def cpu():
    return {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="session")
def text() -> str:
    generator = np.random.default_rng(0)
    return " ".join(generator.choice(WORDS.split(" "), 1200))


@pytest.fixture(scope="session", params=["bytes", "bpe"])
def tokenizer(request, text):
    return ByteTokenizer() if request.param == "bytes" else train_bpe([text], 300)


@pytest.fixture(scope="session")
def documents(text, tokenizer):
    """A short document, a long one, one without text."""
    empty = (np.array([tokenizer.eot_id]), 0)
    return [*text_documents(text[:50], tokenizer), *text_documents(text, tokenizer), empty]
