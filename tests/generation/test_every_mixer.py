"""For each mixer, greedy text with the state has after each token the likeliest one of a pass over all of the text."""

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
    fed = []
    hook = model.register_forward_pre_hook(lambda _, arguments: fed.extend(arguments[0][0].tolist()))
    text = generate(model, tokenizer, prompt, max_tokens=N_TOKENS, temperature=0, device="cpu", dtype=torch.float32)
    hook.remove()
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    with torch.no_grad():
        likeliest = model(torch.tensor([fed])).logits[0].argmax(-1).tolist()[len(ids) - 1 :]
    assert len(likeliest) == N_TOKENS and fed == ids + likeliest[:-1]
    assert text == tokenizer.decode(likeliest)
    assert len(set(likeliest)) > 2
