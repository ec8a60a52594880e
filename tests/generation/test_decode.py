"""Decoding with a scripted model: what is read, sampled, streamed and refused."""

import math

import numpy as np
import pytest
import torch

from fusedlm.generation import generate, next_token_probabilities, sample

CPU = {"device": "cpu", "dtype": torch.float32}


def recomputed(model, prompt_ids, n, choose):
    """The text that decoding without a state gives: every step reads the full sequence."""
    ids = [256, *prompt_ids]
    model.eval()
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, :257]
        ids.append(choose(logits))
    return bytes(ids[1 + len(prompt_ids) :]).decode(errors="replace")


def test_greedy_with_the_state_equals_full_recomputation(model, tokenizer):
    text = generate(model, tokenizer, "Once", max_tokens=40, temperature=0, **CPU)
    assert text == recomputed(model, b"Once", 40, lambda logits: int(logits.argmax()))


def test_sampling_with_the_state_equals_full_recomputation(model, tokenizer):
    text = generate(model, tokenizer, "Once", max_tokens=40, top_k=20, top_p=0.9, seed=3, **CPU)
    generator = torch.Generator().manual_seed(3)
    assert text == recomputed(
        model, b"Once", 40, lambda logits: sample(next_token_probabilities(logits, 1.0, 20, 0.9), generator)
    )


def test_the_prompt_is_one_prefill_and_then_each_step_reads_one_token(model, tokenizer):
    generate(model, tokenizer, "ab", max_tokens=5, **CPU)
    assert model.fed[0] == [[256, 97, 98]]
    assert [len(ids) for (ids,) in model.fed] == [3, 1, 1, 1, 1]


def test_an_empty_prompt_starts_at_end_of_text(model, tokenizer):
    assert generate(model, tokenizer, "", max_tokens=5, **CPU)
    assert model.fed[0] == [[256]]


def test_padding_ids_are_never_sampled(model, tokenizer):
    model.last[:, 257:] = 50.0
    text = generate(model, tokenizer, "x", max_tokens=30, **CPU)
    assert text and all(ids[-1] < 257 for (ids,) in model.fed)


def test_a_seed_decides_the_text(model, tokenizer):
    def text(seed):
        return generate(model, tokenizer, "x", max_tokens=30, seed=seed, **CPU)

    assert text(1) == text(1) != text(2)
    assert text(-1) and text(2**64 - 1)


def test_the_global_generator_is_not_used(model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(generate(model, tokenizer, "x", max_tokens=3, stream=True, **CPU))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("text", ["naïve", "日本語", "a🙂b", "é"])
def test_a_character_of_several_bytes_is_one_piece(scripted, tokenizer, text):
    pieces = list(generate(scripted(text.encode()), tokenizer, "", temperature=0, stream=True, **CPU))
    assert pieces == list(text)


def test_an_incomplete_character_at_the_end_is_replaced(scripted, tokenizer):
    pieces = list(generate(scripted(b"ok\xe6\x97"), tokenizer, "", temperature=0, stream=True, **CPU))
    assert pieces == ["o", "k", "\ufffd"]
    pieces = list(generate(scripted("日本".encode()), tokenizer, "", temperature=0, max_tokens=4, stream=True, **CPU))
    assert pieces == ["日", "\ufffd"]


def test_bytes_that_are_not_utf8_are_replaced(scripted, tokenizer):
    assert generate(scripted(b"a\xff\xc3b"), tokenizer, "", temperature=0, **CPU) == "a\ufffd\ufffdb"


def test_generation_stops_at_end_of_text(scripted, tokenizer):
    model = scripted(b"end")
    assert generate(model, tokenizer, "", temperature=0, max_tokens=50, **CPU) == "end"
    assert model.said == 4


def test_gradients_and_mode_are_the_callers_between_pieces(model, tokenizer):
    model.train()
    stream = generate(model, tokenizer, "x", max_tokens=20, stream=True, **CPU)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert model.training


@pytest.mark.parametrize(
    "arguments,word",
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 2.5}, "max_tokens=2.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompt": 5}, "prompt is a int"),
        ({"prompt": b"x"}, "prompt is a bytes"),
        ({"prompt": ["x", None]}, "prompt 1 is a NoneType"),
        ({"prompt": ["x", "a\ud800"]}, "prompt 1 is not valid Unicode"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"seed": 2**64}, "seed="),
        ({"prompt": "a\ud800"}, "surrogate at character 1"),
    ],
)
def test_impossible_arguments_fail_at_the_call(model, tokenizer, arguments, word):
    with pytest.raises(ValueError, match=word) as caught:
        generate(model, tokenizer, **{"prompt": "x", "stream": True, **CPU, **arguments})
    assert "\n" not in str(caught.value)
    assert not model.fed


def test_logits_that_are_not_finite_are_an_error(model, tokenizer):
    model.last[:] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        list(generate(model, tokenizer, "x", stream=True, **CPU))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 5.0}, {"top_k": 3}, {"top_p": 0.9}])
def test_ids_without_a_token_are_never_drawn(model, tokenizer, options):
    gaps = [ord("A"), ord("z"), *range(257, 320)]
    model.last[:, gaps] = 1e6
    tokenizer.unused_ids = lambda limit: np.array(gaps)
    text = generate(model, tokenizer, "once", max_tokens=40, **options, **CPU)
    assert text and not set(text) & {"A", "z"} and not any(id_ in gaps for fed in model.fed[1:] for id_ in fed)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(model, tokenizer):
    model.vocab_size = 100
    with pytest.raises(ValueError, match="257 ids and the model 100"):
        generate(model, tokenizer, "x", **CPU)
