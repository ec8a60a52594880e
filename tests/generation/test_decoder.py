"""Generation with the real decoder and real tokenizers."""

import pytest
import torch

from fusedlm.data.tokenizer import ByteTokenizer, train_bpe
from fusedlm.generation import generate
from fusedlm.model import build_model
from fusedlm.testing import every_mixer_config, randomise_

CPU = {"device": "cpu", "dtype": torch.float32}
CONFIG = every_mixer_config(tie_embeddings=False, dropout=0.5)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else train_bpe(["the union of these united states " * 9], 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    return randomise_(build_model(CONFIG, vocab_size=tokenizer.vocab_size, seed=1), scale=0.3)


@pytest.mark.parametrize("prompt", ["", "the states — 日本 "])
def test_greedy_with_the_state_equals_full_recomputation(model, tokenizer, prompt):
    text = generate(model, tokenizer, prompt, max_tokens=40, temperature=0, **CPU)
    model.eval()
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    n_prompt = len(ids)
    with torch.no_grad():
        for _ in range(40):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eot_id:
                break
            ids.append(token)
    assert len(ids) > n_prompt
    assert text == tokenizer.decode(ids[n_prompt:])


def test_a_state_that_grows_gives_the_same_text(model, tokenizer, monkeypatch):
    reserved = generate(model, tokenizer, "the", max_tokens=30, seed=4, **CPU)
    monkeypatch.setattr("fusedlm.generation.steps._RESERVED_TOKENS", 0)
    assert generate(model, tokenizer, "the", max_tokens=30, seed=4, **CPU) == reserved


def test_a_huge_limit_reserves_no_memory(model, tokenizer):
    assert next(generate(model, tokenizer, "the", max_tokens=10**12, seed=4, stream=True, **CPU))


def test_the_dtype_is_that_of_the_matrix_products(model, tokenizer):
    """Logits of every step are those under autocast, to the last bit, and not those in float32."""

    def logits_of(dtype):
        found = []
        hook = model.register_forward_hook(lambda _, inputs, output: found.append(output.logits))
        generate(model, tokenizer, "the states", max_tokens=4, temperature=0, device="cpu", dtype=dtype)
        hook.remove()
        return found

    def prefill(dtype):
        ids = torch.tensor([[tokenizer.eot_id, *tokenizer.encode("the states")]])
        last = torch.tensor([ids.shape[1] - 1])
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model.eval()(ids, state=model.init_state(1), select=last).logits

    rounded, exact = logits_of(torch.bfloat16), logits_of(torch.float32)
    assert torch.equal(rounded[0], prefill(torch.bfloat16)) and torch.equal(exact[0], prefill(torch.float32))
    assert not torch.equal(rounded[0], exact[0])
    assert all(torch.equal(step, step.bfloat16().float()) for step in rounded)
    assert not any(torch.equal(step, step.bfloat16().float()) for step in exact)


@pytest.mark.gpu
def test_a_seed_gives_the_same_text_on_the_gpu(model, tokenizer):
    expected = generate(model, tokenizer, "the", max_tokens=30, seed=4, **CPU)
    on_gpu = build_model(CONFIG, vocab_size=tokenizer.vocab_size, device="cuda")
    on_gpu.load_state_dict(model.state_dict())
    text = generate(on_gpu, tokenizer, "the", max_tokens=30, seed=4, device="cuda", dtype=torch.float32)
    assert text == expected
    assert generate(on_gpu, tokenizer, "the", max_tokens=8, device="cuda", dtype=torch.bfloat16)
