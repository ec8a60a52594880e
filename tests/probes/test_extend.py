"""Bits per byte by position: buckets, the comparison of near and far, YaRN."""

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
    """One window over a full text scores what scoring the document gives."""
    ((tokens, n_bytes),) = text_documents(text[:700], tokenizer)
    trained_length = (len(tokens) - 1) // 8
    tokens = tokens[: 1 + 8 * trained_length]
    n_bytes = len(tokenizer.decode_bytes(tokens.tolist()))
    result = probe_extend(model, [(tokens, n_bytes)], tokenizer, trained_length=trained_length, **cpu)
    assert result["windows"] == 1 and result["max_multiple"] == 8 and result["ends"][-1] == 8 * trained_length
    assert len(result["ends"]) == len(result["bytes"]) == 32
    assert sum(result["bytes"]) == n_bytes
    score = score_documents(model, [(tokens, n_bytes)], window=len(tokens), **cpu)
    assert bits(result) == pytest.approx(score.nll / math.log(2), rel=1e-5)
    assert result["curves"][0]["at_4x"] is None  # no text was scored at both positions


def test_buckets_hold_the_bits_of_their_positions(model, tokenizer, text, cpu):
    ((tokens, n_bytes),) = text_documents(text[:400], tokenizer)
    tokens = tokens[:65]
    result = probe_extend(model, [(tokens, n_bytes)], tokenizer, trained_length=8, factors=(), **cpu)
    nll = torch.cat(list(stream_nll(model, tokens[None], **cpu)), dim=1)[0].numpy()
    sizes = [len(tokenizer.decode_bytes(tokens[1 : i + 1].tolist())) for i in range(65)]
    for i, (end, bpb) in enumerate(zip(result["ends"], result["curves"][0]["bpb"], strict=True)):
        assert end == 2 * (i + 1)
        assert bpb == pytest.approx(nll[end - 2 : end].sum() / math.log(2) / (sizes[end] - sizes[end - 2]))


def near_and_far(model, tokenizer, text, cpu) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of seven pieces of four tokens at the end of 16 and of 64 tokens of context, and the bytes of the pieces."""
    bits, n_bytes = {16: [], 64: []}, []
    for last in range(64, 64 + 16 * 7, 16):
        for length, found in bits.items():
            tokens = np.concatenate([[tokenizer.eot_id], text[last - length : last]])
            nats = torch.cat(list(stream_nll(model, tokens[None], **cpu)), dim=1)[0, -4:].sum().item()
            found.append(nats / math.log(2))
        before, after = (len(tokenizer.decode_bytes(text[:end].tolist())) for end in (last - 4, last))
        n_bytes.append(after - before)
    return np.array(bits[16]), np.array(bits[64]), np.array(n_bytes)


def ratio(costs, sizes) -> tuple[float, float]:
    """Sum over sum, and its standard error, worked out piece by piece."""
    found = sum(costs) / sum(sizes)
    squares = sum((cost - found * size) ** 2 for cost, size in zip(costs, sizes, strict=True))
    return found, math.sqrt(squares / (len(costs) - 1) / len(costs)) / (sum(sizes) / len(sizes))


def test_near_and_far_and_with_and_without_yarn_are_compared_on_the_same_text(model, tokenizer, documents, cpu):
    result = probe_extend(model, documents, tokenizer, trained_length=16, factors=(4.0,), samples=10, **cpu)
    assert result["windows"] == 10 and result["tokens"] == 10 * 8 * 16
    text = max((tokens for tokens, _ in documents), key=len)[1:]
    near, far, n_bytes = near_and_far(model, tokenizer, text, cpu)
    stretch_context(model, 4.0, 16)
    stretched_near, stretched_far, _ = near_and_far(model, tokenizer, text, cpu)
    model.set_yarn(None)
    plain, stretched = result["curves"]
    for curve, at_1x, at_4x in ((plain, near, far), (stretched, stretched_near, stretched_far)):
        assert curve["at_1x"] == pytest.approx(sum(at_1x) / sum(n_bytes), rel=1e-4)
        assert curve["at_4x"] == pytest.approx(sum(at_4x) / sum(n_bytes), rel=1e-4)
        expected = ratio(at_4x - at_1x, n_bytes)
        assert (curve["difference"], curve["standard_error"]) == pytest.approx(expected, rel=1e-2, abs=1e-5)
    for name, change in (("change_1x", stretched_near - near), ("change_4x", stretched_far - far)):
        expected = ratio(change, n_bytes)
        assert (stretched[name], stretched[f"{name}_error"]) == pytest.approx(expected, rel=1e-2, abs=1e-5)
        assert plain[name] is None and abs(stretched[name]) > 1e-4


def test_yarn_of_factor_one_changes_nothing_and_other_factors_do(model, tokenizer, documents, cpu):
    own = model.yarn
    result = probe_extend(model, documents, tokenizer, trained_length=16, factors=(1.0, 4.0), samples=3, **cpu)
    plain, one, four = (np.array(curve["bpb"]) for curve in result["curves"])
    assert [curve["yarn"] for curve in result["curves"]] == [None, 1.0, 4.0] and result["rope"]
    np.testing.assert_allclose(one, plain, rtol=1e-5)
    assert (np.abs(four - plain) > 1e-4).sum() > 16
    assert model.yarn is own


def test_a_model_without_rope_has_only_the_unstretched_curve(tokenizer, documents, cpu):
    model = part_model("{type: gdn, n_heads: 2, chunk_size: 16}", vocab_size=tokenizer.vocab_size).eval()
    result = probe_extend(model, documents, tokenizer, trained_length=16, samples=2, **cpu)
    assert not result["rope"] and [curve["yarn"] for curve in result["curves"]] == [None]
    with pytest.raises(ValueError, match="no mixer"):
        stretch_context(model, 2.0, 16)


def test_windows_are_shorter_where_documents_are(model, tokenizer, documents, cpu):
    longest = max(len(tokens) - 1 for tokens, _ in documents)
    result = probe_extend(model, documents, tokenizer, trained_length=longest // 2, factors=(), **cpu)
    assert result["max_multiple"] == 2 and result["curves"][0]["difference"] is None
    with pytest.raises(ValueError, match=f"{longest} tokens, fewer than the training length {longest + 1}"):
        probe_extend(model, documents, tokenizer, trained_length=longest + 1, factors=(), **cpu)


def test_training_lengths_that_four_buckets_do_not_divide(model, tokenizer, documents, cpu):
    for trained_length, buckets in ((1, 1), (3, 3), (5, 4)):
        result = probe_extend(model, documents, tokenizer, trained_length=trained_length, factors=(), samples=20, **cpu)
        assert len(result["ends"]) == 8 * buckets and result["ends"][buckets - 1] == trained_length


@pytest.mark.parametrize("factor", [0.5, float("inf"), float("nan")])
def test_factors_out_of_range_are_named(factor, model, tokenizer, documents, cpu):
    with pytest.raises(ValueError, match=f"factor {factor:g}"):
        probe_extend(model, documents, tokenizer, trained_length=16, factors=(factor,), **cpu)
    assert model.yarn is None


def test_a_recipe_with_yarn_keeps_its_trained_length(tokenizer):
    yarn = "yarn: {factor: 2, trained_length: 24, beta_fast: 16}"
    model = part_model("{type: attention, n_heads: 2}", vocab_size=tokenizer.vocab_size, extra=yarn)
    stretch_context(model, 8, 48)
    assert (model.yarn.factor, model.yarn.trained_length, model.yarn.beta_fast) == (8.0, 24, 16.0)
