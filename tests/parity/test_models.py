"""Whole decoders against Qwen3 of Hugging Face Transformers, weights copied: logits and all gradients in float64."""

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from fusedlm.nn.rope import YaRN, yarn_frequencies, yarn_score_gain
from fusedlm.testing import assert_close, part_model, randomise_

N, DIM, HIDDEN, VOCAB = 40, 32, 48, 61
HEADS, GROUPS, WIDTH = 4, 2, 8
BOUND = 1e-11


def _theirs(window=None, rope=None, gain="head"):
    layer = "full_attention" if window is None else "sliding_attention"
    config = qwen3.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=WIDTH,
        rms_norm_eps=1e-6,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10_000.0},
        use_sliding_window=window is not None,
        sliding_window=window,
        layer_types=[layer, layer],
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = randomise_(qwen3.Qwen3ForCausalLM(config).double(), scale=0.1).eval()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers if gain == "head" else ()):
            layer.self_attn.q_norm.weight.fill_(1.5 + index)  # ours is one number per head
            layer.self_attn.k_norm.weight.fill_(1.0)  # of which ours has none
    return model


def _ours(window=None, extra="", gain="head"):
    sizes = f"n_heads: {HEADS}, n_kv_heads: {GROUPS}, window: {window or 'null'}"
    attention = f"{{type: attention, {sizes}, qk_gain: {gain}}}"
    plain = "tie_embeddings: false, embedding_rms: null, vocab_multiple: 1"
    return part_model(attention, f"{{type: swiglu, hidden: {HIDDEN}}}", VOCAB, extra=f"{plain}{extra}").double()


def _packed(get, gain="head"):
    """Parameters of ours from get(name) of theirs; gains per head are not among them."""
    packed = {
        "embedding.weight": get("model.embed_tokens.weight"),
        "head.weight": get("lm_head.weight"),
        "head.norm.weight": get("model.norm.weight"),
    }
    for i in range(2):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        qkv = [get(f"{theirs}.self_attn.{name}_proj.weight") for name in "qkv"]
        gate_up = [get(f"{theirs}.mlp.{name}_proj.weight") for name in ("gate", "up")]
        packed |= {
            f"{ours}.mixer_norm.weight": get(f"{theirs}.input_layernorm.weight"),
            f"{ours}.mixer.qkv.weight": torch.cat(qkv),
            f"{ours}.mixer.out.weight": get(f"{theirs}.self_attn.o_proj.weight"),
            f"{ours}.ffn_norm.weight": get(f"{theirs}.post_attention_layernorm.weight"),
            f"{ours}.ffn.gate_up.weight": torch.cat(gate_up),
            f"{ours}.ffn.down.weight": get(f"{theirs}.mlp.down_proj.weight"),
        }
        if gain == "dim":
            packed |= {f"{ours}.mixer.{name}_gain": get(f"{theirs}.self_attn.{name}_norm.weight") for name in "qk"}
    return packed


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "window, rope, gain",
    [(None, None, "head"), (7, None, "head"), (None, YARN, "head"), (None, None, "dim")],
    ids=["full", "window", "yarn", "gain per dimension"],
)
def test_is_qwen3(window, rope, gain, in_float64):
    with in_float64():
        theirs = _theirs(window, rope, gain)
    ours = _ours(window, "" if rope is None else ", yarn: {factor: 4.0, trained_length: 64}", gain)
    parameters = dict(ours.named_parameters())
    packed = _packed(lambda name: theirs.get_parameter(name).detach(), gain)
    gains = {f"blocks.{i}.mixer.q_gain": torch.full((HEADS,), 1.5 + i) for i in range(2) if gain == "head"}
    assert packed.keys() | gains.keys() == parameters.keys()
    with torch.no_grad():
        for name, value in (packed | gains).items():
            parameters[name].copy_(value)
    tokens = torch.randint(0, VOCAB, (2, N + 1), generator=torch.Generator().manual_seed(0))
    output = ours(tokens[:, :-1], targets=tokens[:, 1:])
    output.total().backward()
    with in_float64():
        logits = theirs(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
    assert logits.dtype == torch.float64
    assert_close(ours(tokens[:, :-1]).logits, logits, BOUND)
    assert_close(output.losses["nll"], loss, BOUND, "loss")
    for name, gradient in _packed(lambda name: theirs.get_parameter(name).grad, gain).items():
        assert_close(parameters[name].grad, gradient, BOUND, name)
    for i, layer in enumerate(theirs.model.layers if gain == "head" else ()):
        # A gain per dimension, all of one value: the chain rule adds up.
        expected = layer.self_attn.q_norm.weight.grad.sum()
        assert_close(parameters[f"blocks.{i}.mixer.q_gain"].grad.sum(), expected, BOUND, "gain")


@pytest.mark.parametrize("dim, base, factor, trained, fast, slow", [
    (64, 10_000.0, 4.0, 2048, 32.0, 1.0),
    (128, 1_000_000.0, 8.0, 32768, 32.0, 1.0),
    (16, 10_000.0, 2.0, 512, 32.0, 1.0),
    (32, 500.0, 16.0, 128, 4.0, 0.5),
    (8, 10_000.0, 4.0, 64, 32.0, 1.0),
    (64, 10_000.0, 1.0, 2048, 32.0, 1.0),
])  # fmt: skip
def test_yarn_is_that_of_transformers(dim, base, factor, trained, fast, slow, in_float64):
    rope = {"rope_type": "yarn", "rope_theta": base, "factor": factor, "original_max_position_embeddings": trained}
    config = qwen3.Qwen3Config(head_dim=dim, rope_parameters=rope | {"beta_fast": fast, "beta_slow": slow})
    with in_float64():
        frequencies, gain = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    yarn = YaRN(factor, trained, beta_fast=fast, beta_slow=slow)
    assert_close(yarn_frequencies(dim, base, yarn), frequencies, 1e-12)
    assert yarn_score_gain(yarn) == pytest.approx(gain**2, rel=1e-12)
