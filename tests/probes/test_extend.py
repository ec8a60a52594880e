import math

import numpy as np
import pytest
import torch

from fusedlm.evaluate import score_documents, stream_nll, text_documents
from fusedlm.model import build_model
from fusedlm.model.yarn import stretch_context
from fusedlm.probes import probe_extend
from fusedlm.testing import every_mixer_config, part_model, randomise_


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return randomise_(build_model(every_mixer_config(), vocab_size=tokenizer.vocab_size)).eval()


def bits(result, curve=0):
    return sum(np.array(result["curves"][curve]["bpb"]) * result["bytes"])


def test_bytes_and_bits_are_those_of_the_text(model, tokenizer, text, cpu):
    """One window over all of a text: what scoring the document whole gives."""
    ((tokens, n_bytes),) = text_documents(text[:700], tokenizer)
    trained_length = (len(tokens) - 1) // 8
    tokens = tokens[: 1 + 8 * trained_length]
    n_bytes = len(tokenizer.decode_bytes(tokens.tolist()))
    result = probe_extend(model, [(tokens, n_bytes)], tokenizer, trained_length=trained_length, **cpu)
    assert result["windows"] == 1 and result["reach"] == 8 and result["ends"][-1] == 8 * trained_length
    assert len(result["ends"]) == len(result["bytes"]) == 32
    assert sum(result["bytes"]) == n_bytes
    score = score_documents(model, [(tokens, n_bytes)], window=len(tokens), **cpu)
    assert bits(result) == pytest.approx(score.nll / math.log(2), rel=1e-5)
    assert result["curves"][0]["at_4x"] is None  # no text was scored at both places


def test_buckets_hold_the_bits_of_their_positions(model, tokenizer, text, cpu):
    ((tokens, n_bytes),) = text_documents(text[:400], tokenizer)
    tokens = tokens[:65]
    result = probe_extend(model, [(tokens, n_bytes)], tokenizer, trained_length=8, factors=(), **cpu)
    nll = torch.cat(list(stream_nll(model, tokens[None], **cpu)), dim=1)[0].numpy()
    sizes = [len(tokenizer.decode_bytes(tokens[1 : i + 1].tolist())) for i in range(65)]
    for i, (end, bpb) in enumerate(zip(result["ends"], result["curves"][0]["bpb"], strict=True)):
        assert end == 2 * (i + 1)
        assert bpb == pytest.approx(nll[end - 2 : end].sum() / math.log(2) / (sizes[end] - sizes[end - 2]))


def test_near_and_far_are_compared_on_the_same_text(model, tokenizer, documents, cpu):
    result = probe_extend(model, documents, tokenizer, trained_length=16, factors=(), samples=10, **cpu)
    assert result["windows"] == 10 and result["tokens"] == 10 * 8 * 16
    text = max((tokens for tokens, _ in documents), key=len)[1:]
    near = far = n_bytes = 0
    for last in range(64, 64 + 16 * 7, 16):  # where the pieces end: window i has them fourth, window i + 3 first
        window = np.concatenate([[tokenizer.eot_id], text[last - 64 : last]])
        for length in (16, 64):
            tokens = np.concatenate([window[:1], window[len(window) - length :]])
            nats = torch.cat(list(stream_nll(model, tokens[None], **cpu)), dim=1)[0, -4:].sum().item()
            near, far = (near + nats, far) if length == 16 else (near, far + nats)
        n_bytes += len(tokenizer.decode_bytes(text[:last].tolist())) - len(
            tokenizer.decode_bytes(text[: last - 4].tolist())
        )
    curve = result["curves"][0]
    assert curve["at_1x"] == pytest.approx(near / math.log(2) / n_bytes, rel=1e-4)
    assert curve["at_4x"] == pytest.approx(far / math.log(2) / n_bytes, rel=1e-4)
    assert curve["difference"] == pytest.approx(curve["at_4x"] - curve["at_1x"])
    assert curve["no_worse"] == (curve["difference"] <= 0) and curve["standard_error"] > 0


def test_yarn_of_factor_one_is_the_model_and_others_are_not(model, tokenizer, documents, cpu):
    own = model.yarn
    result = probe_extend(model, documents, tokenizer, trained_length=16, factors=(1.0, 4.0), samples=3, **cpu)
    plain, one, four = (np.array(curve["bpb"]) for curve in result["curves"])
    assert [curve["yarn"] for curve in result["curves"]] == [None, 1.0, 4.0] and result["rope"]
    np.testing.assert_allclose(one, plain, rtol=1e-5)
    assert (np.abs(four - plain) > 1e-4).sum() > 16
    assert model.yarn is own


def test_a_model_without_rope_has_the_plain_curve_alone(tokenizer, documents, cpu):
    model = part_model("{type: gdn, n_heads: 2, chunk_size: 16}", vocab_size=tokenizer.vocab_size).eval()
    result = probe_extend(model, documents, tokenizer, trained_length=16, samples=2, **cpu)
    assert not result["rope"] and [curve["yarn"] for curve in result["curves"]] == [None]
    with pytest.raises(ValueError, match="no mixer"):
        stretch_context(model, 2.0, 16)


def test_shorter_documents_reach_less_far(model, tokenizer, documents, cpu):
    longest = max(len(tokens) - 1 for tokens, _ in documents)
    result = probe_extend(model, documents, tokenizer, trained_length=longest // 2, factors=(), **cpu)
    assert result["reach"] == 2 and result["curves"][0]["no_worse"] is None
    with pytest.raises(ValueError, match=f"{longest} tokens, fewer than the training length {longest + 1}"):
        probe_extend(model, documents, tokenizer, trained_length=longest + 1, factors=(), **cpu)


def test_a_training_length_of_one_and_of_no_multiple_of_four(model, tokenizer, documents, cpu):
    for trained_length, buckets in ((1, 1), (3, 3), (5, 4)):
        result = probe_extend(model, documents, tokenizer, trained_length=trained_length, factors=(), samples=20, **cpu)
        assert len(result["ends"]) == 8 * buckets and result["ends"][buckets - 1] == trained_length


@pytest.mark.parametrize("factor", [0.5, float("inf"), float("nan")])
def test_factors_out_of_range(factor, model, tokenizer, documents, cpu):
    with pytest.raises(ValueError, match=f"factor {factor:g}"):
        probe_extend(model, documents, tokenizer, trained_length=16, factors=(factor,), **cpu)
    assert model.yarn is None


def test_a_recipe_with_yarn_keeps_the_length_that_it_names(tokenizer):
    yarn = "yarn: {factor: 2, trained_length: 24, beta_fast: 16}"
    model = part_model("{type: attention, n_heads: 2}", vocab_size=tokenizer.vocab_size, extra=yarn)
    stretch_context(model, 8, 48)
    assert (model.yarn.factor, model.yarn.trained_length, model.yarn.beta_fast) == (8.0, 24, 16.0)
