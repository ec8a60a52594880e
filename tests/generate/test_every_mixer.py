"""Greedy text by the state is that of recomputing everything for every token, for each mixer there is."""

import pytest
import torch

from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.generate import generate
from fusedlm.model import build_model
from fusedlm.testing import MIXER_CASES, part_model

N_TOKENS = 256


@pytest.mark.parametrize("case", [cases[0] for cases in MIXER_CASES.values()], ids=list(MIXER_CASES))
def test_256_greedy_tokens(case):
    tokenizer = ByteTokenizer()
    torch.manual_seed(3)
    model = build_model(part_model(case, extra="tie_embeddings: false").config, vocab_size=tokenizer.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        model.head.weight[tokenizer.eot_id] = 0  # an end of text would end the comparison early
    prompt = "It is "
    pieces = generate(model, tokenizer, prompt, max_tokens=N_TOKENS, temperature=0, device="cpu", dtype=torch.float32)
    text = "".join(pieces)
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    n_prompt = len(ids)
    with torch.no_grad():
        for _ in range(N_TOKENS):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert text == tokenizer.decode(ids[n_prompt:])
    assert len(set(ids[n_prompt:])) > 8
