"""Many prompts: each has the text that it has alone, whatever the others are."""

import pytest
import torch

import fusedlm
from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.generation import generate
from fusedlm.testing import FFN_CASES, MIXER_CASES, NO_FFN, part_model, randomise_

CPU = {"device": "cpu", "dtype": torch.float32}
PROMPTS = ["It is ", "", "a prompt that is much longer than the others, and than any window", "né"]
CASES = [(case, "{type: swiglu, hidden: 48}") for cases in MIXER_CASES.values() for case in cases]
CASES += [("{type: gdn, n_heads: 2, chunk_size: 8}", case) for cases in FFN_CASES.values() for case in cases]
CASES += [(MIXER_CASES["mamba2"][0], NO_FFN)]


def _model(mixer, ffn):
    model = part_model(mixer, ffn, vocab_size=ByteTokenizer.vocab_size, extra="tie_embeddings: false").double()
    return randomise_(model, scale=0.3)


@pytest.mark.parametrize(("mixer", "ffn"), CASES)
def test_a_batch_of_any_lengths_has_the_texts_of_its_prompts(mixer, ffn):
    model, tokenizer = _model(mixer, ffn), ByteTokenizer()
    with torch.no_grad():  # some rows end before others
        model.head.weight[tokenizer.eot_id] *= 2
    options = {"max_tokens": 10, "temperature": 0, **CPU}
    alone = [generate(model, tokenizer, prompt, **options) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, **options) == alone


def test_rows_that_end_early_leave_the_others_as_they_are(model, tokenizer):
    model.last[:, 256] = model.last[:, :256].amax(1) - 0.1  # many texts end soon
    prompts = [f"prompt {i}" for i in range(9)]
    alone = [generate(model, tokenizer, prompt, temperature=0, max_tokens=30, **CPU) for prompt in prompts]
    assert len({len(text) for text in alone}) > 3
    model.fed.clear()
    assert generate(model, tokenizer, prompts, temperature=0, max_tokens=30, **CPU) == alone
    assert any(0 < sum(map(bool, rows)) < 9 for rows in model.fed)


def test_each_prompt_has_its_own_seed(model, tokenizer):
    texts = generate(model, tokenizer, ["x"] * 5, seed=7, max_tokens=30, batch_size=2, **CPU)
    assert len(set(texts)) == 5
    assert texts == [generate(model, tokenizer, "x", seed=7 + i, max_tokens=30, **CPU) for i in range(5)]
    last = generate(model, tokenizer, ["x", "x"], seed=2**64 - 1, max_tokens=30, **CPU)
    assert last[1] == generate(model, tokenizer, "x", seed=0, max_tokens=30, **CPU)


def test_pieces_of_a_batch_name_their_prompt(model, tokenizer):
    texts = generate(model, tokenizer, PROMPTS, max_tokens=9, batch_size=3, **CPU)
    stream = generate(model, tokenizer, PROMPTS, max_tokens=9, batch_size=3, stream=True, **CPU)
    first = next(stream)
    assert len(model.fed) < 2 * 9 + 1 + 9  # the rest is not decoded yet
    joined = [""] * len(PROMPTS)
    for index, piece in [first, *stream]:
        assert piece
        joined[index] += piece
    assert joined == texts


def test_no_prompts_give_no_texts(model, tokenizer):
    assert generate(model, tokenizer, [], **CPU) == []
    assert list(generate(model, tokenizer, (), stream=True, **CPU)) == []


def test_the_device_and_the_dtype_are_found(model):
    decoder, tokenizer = _model(*CASES[0]).float(), ByteTokenizer()
    assert fusedlm.generate(decoder, tokenizer, "It", seed=1) == generate(decoder, tokenizer, "It", seed=1, **CPU)
    with pytest.raises(ValueError, match="the tokenizer has 257 ids and the model 61"):
        generate(part_model("{type: attention, n_heads: 4}"), tokenizer, "x")


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [cases[0] for cases in MIXER_CASES.values()], ids=list(MIXER_CASES))
def test_a_batch_on_the_gpu_has_the_texts_of_its_prompts(mixer):
    model, tokenizer = _model(mixer, CASES[0][1]).float().cuda(), ByteTokenizer()
    options = {"max_tokens": 24, "temperature": 0, "dtype": "float32"}
    alone = [generate(model, tokenizer, prompt, **options) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, **options) == alone
    assert len(generate(model, tokenizer, PROMPTS, max_tokens=8)) == len(PROMPTS)


@pytest.mark.multi_gpu
def test_a_model_on_the_second_gpu_decodes_there():
    tokenizer = ByteTokenizer()
    first = _model("{type: gdn, n_heads: 2, chunk_size: 8}", "{type: relu2, hidden: 64}").float().cuda(0)
    expected = generate(first, tokenizer, PROMPTS, max_tokens=24, temperature=0)
    second = first.to("cuda:1")
    assert generate(second, tokenizer, PROMPTS, max_tokens=24, temperature=0) == expected
    assert torch.cuda.current_device() == 0
