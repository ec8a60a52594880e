"""For each mixer, greedy text with the state is that of recomputing the full sequence in each step."""

import pytest
import torch

from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.generation import generate
from fusedlm.testing import MIXER_CASES, part_model, randomise_

N_TOKENS = 256


@pytest.mark.parametrize("case", [cases[0] for cases in MIXER_CASES.values()], ids=list(MIXER_CASES))
def test_256_greedy_tokens(case):
    tokenizer = ByteTokenizer()
    model = part_model(case, vocab_size=tokenizer.vocab_size, extra="tie_embeddings: false").eval()
    randomise_(model, scale=0.3)
    with torch.no_grad():
        model.head.weight[tokenizer.eot_id] = 0  # end-of-text would stop the comparison early
    prompt = "It is "
    text = generate(model, tokenizer, prompt, max_tokens=N_TOKENS, temperature=0, device="cpu", dtype=torch.float32)
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    n_prompt = len(ids)
    with torch.no_grad():
        for _ in range(N_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert text == tokenizer.decode(ids[n_prompt:])
    assert len(set(ids[n_prompt:])) > 2
