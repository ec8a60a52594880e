"""Mixers against the same ones in Hugging Face Transformers, weights copied: outputs and all gradients in float64."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.diffllama import modeling_diffllama as diffllama
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from fusedlm.nn.context import Context
from fusedlm.nn.mixers.diff_mla import StaticLambda
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.ops import differential_combine
from fusedlm.testing import assert_close, part_model, randomise_

N, DIM = 37, 32
BOUND = 1e-12


def _mixer(case):
    return part_model(case).double().blocks[0].mixer


def _random(module, scale=0.3):
    """In float64, every parameter away from its start."""
    return randomise_(module.double(), scale)


def _compare(in_float64, ours, theirs, pack, run_theirs, rope=False):
    """Copies weights by `pack(get)`, which gives our parameters by name from get(name) of theirs, and compares outputs
    and gradients; gradients of theirs are packed in the same way."""
    parameters = dict(ours.named_parameters())
    packed = pack(lambda name: theirs.get_parameter(name).detach())
    assert packed.keys() == parameters.keys()
    with torch.no_grad():
        for name, value in packed.items():
            parameters[name].copy_(value)
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 2, N, DIM, dtype=torch.float64, generator=generator)
    context = Context(torch.arange(N)[None])
    context.add_rope(ours.rope_specs(), torch.float64)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y = ours(leaves[0], context)
    (y * upstream).sum().backward()
    with in_float64():
        expected = run_theirs(leaves[1])
        (expected * upstream).sum().backward()
    assert expected.dtype == torch.float64 and expected.norm() > 1e-3
    assert_close(y, expected, BOUND)
    assert_close(leaves[0].grad, leaves[1].grad, BOUND, "x")
    for name, gradient in pack(lambda name: theirs.get_parameter(name).grad).items():
        assert gradient.norm() > 0, name
        assert_close(parameters[name].grad, gradient, BOUND, name)


def _rotary(module, config, in_float64):
    with in_float64():
        return module(config)(torch.zeros(2, 1, dtype=torch.float64), torch.arange(N)[None])


def _taps(weight_C1K):
    """(K, C), the newest input's first."""
    return weight_C1K[:, 0].flip(1).T


@pytest.mark.parametrize("heads, key_dim, value_dim, taps", [(2, 16, 16, 4), (4, 6, 10, 2)])
def test_gated_delta_net_is_that_of_qwen3_next(heads, key_dim, value_dim, taps, in_float64):
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=DIM,
        linear_num_value_heads=heads,
        linear_num_key_heads=heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=taps,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-6,
    )
    theirs = _random(qwen3_next.Qwen3NextGatedDeltaNet(config, 0))
    sizes = f"n_heads: {heads}, head_dim: {key_dim}, value_head_dim: {value_dim}, conv_size: {taps}, chunk_size: 16"
    ours = _mixer(f"{{type: gdn, {sizes}}}")

    def pack(get):
        per_head = get("in_proj_qkvz.weight").unflatten(0, (heads, -1))
        q, k, v, z = (x.flatten(0, 1) for x in per_head.split([key_dim, key_dim, value_dim, value_dim], dim=1))
        b, a = get("in_proj_ba.weight").unflatten(0, (heads, 2)).unbind(1)
        return {
            "qkv.weight": torch.cat([q, k, v]),
            "conv.weight": _taps(get("conv1d.weight")),
            "gates.weight": torch.cat([a, b]),
            "z.weight": z,
            "norm.weight": get("norm.weight"),
            "out.weight": get("out_proj.weight"),
            "log_rate": get("A_log"),
            "dt_bias": get("dt_bias"),
        }

    _compare(in_float64, ours, theirs, pack, theirs)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mamba2_is_that_of_the_published_model_without_the_bias_of_its_convolution(groups, in_float64):
    heads, width, state, taps = 4, 16, 6, 4
    config = mamba2.Mamba2Config(
        hidden_size=DIM,
        num_heads=heads,
        head_dim=width,
        state_size=state,
        n_groups=groups,
        conv_kernel=taps,
        chunk_size=8,
        expand=2,
        use_conv_bias=False,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-6,
    )
    theirs = _random(mamba2.Mamba2Mixer(config, 0)).eval()
    ours = _mixer(f"{{type: mamba2, n_heads: {heads}, state_dim: {state}, n_groups: {groups}, chunk_size: 16}}")

    def pack(get):
        return {
            "project.weight": get("in_proj.weight"),
            "conv.weight": _taps(get("conv1d.weight")),
            "norm.weight": get("norm.weight"),
            "out.weight": get("out_proj.weight"),
            "log_rate": get("A_log"),
            "dt_bias": get("dt_bias"),
            "skip": get("D"),
        }

    _compare(in_float64, ours, theirs, pack, theirs)
    assert mamba2.Mamba2Config().use_conv_bias, "what ours leaves out is still on in the published model"


@pytest.mark.parametrize("q_rank", [None, 20])
def test_mla_is_that_of_deepseek_v3(q_rank, in_float64):
    heads, width, rank, rope = 4, 8, 12, 6
    config = deepseek.DeepseekV3Config(
        hidden_size=DIM,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=q_rank,
        kv_lora_rank=rank,
        qk_nope_head_dim=width,
        qk_rope_head_dim=rope,
        v_head_dim=width,
        rope_interleave=False,
        attn_implementation="sdpa",
    )
    theirs = _random(deepseek.DeepseekV3Attention(config, 0))
    q = "" if q_rank is None else f", q_rank: {q_rank}"
    ours = _mixer(f"{{type: mla, n_heads: {heads}, kv_rank: {rank}, rope_dim: {rope}{q}}}")
    table = _rotary(deepseek.DeepseekV3RotaryEmbedding, config, in_float64)

    def pack(get):
        k, v = get("kv_b_proj.weight").unflatten(0, (heads, 2, width)).unbind(1)
        down = [get("kv_a_proj_with_mqa.weight")]
        queries = {"q_up.weight": get("q_proj.weight")} if q_rank is None else {}
        if q_rank is not None:
            down = [get("q_a_proj.weight"), *down]
            queries = {"q_up.weight": get("q_b_proj.weight"), "q_norm.weight": get("q_a_layernorm.weight")}
        return queries | {
            "down.weight": torch.cat(down),
            "kv_norm.weight": get("kv_a_layernorm.weight"),
            "kv_up.weight": torch.cat([k.flatten(0, 1), v.flatten(0, 1)]),
            "out.weight": get("o_proj.weight"),
        }

    _compare(in_float64, ours, theirs, pack, lambda x: theirs(x, table, None)[0])


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_partial_rotary_embedding_is_that_of_gpt_neox(fraction, in_float64):
    heads, width = 4, 8
    config = neox.GPTNeoXConfig(
        hidden_size=DIM,
        num_attention_heads=heads,
        attention_bias=False,
        attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": fraction},
    )
    theirs = _random(neox.GPTNeoXAttention(config, 0))
    ours = _mixer(f"{{type: attention, n_heads: {heads}, qk_norm: false, rope_dim: {int(width * fraction)}}}")
    table = _rotary(neox.GPTNeoXRotaryEmbedding, config, in_float64)

    def pack(get):
        q, k, v = get("query_key_value.weight").unflatten(0, (heads, 3, width)).unbind(1)
        return {"qkv.weight": torch.cat([x.flatten(0, 1) for x in (q, k, v)]), "out.weight": get("dense.weight")}

    _compare(in_float64, ours, theirs, pack, lambda x: theirs(x, None, position_embeddings=table)[0])


@pytest.mark.parametrize("layer", [0, 3])
def test_the_combination_of_streams_is_that_of_diffllama(layer, in_float64, monkeypatch):
    """Its attention is stood in for by fixed outputs: what follows them is compared."""
    heads, width = 4, 8
    config = diffllama.DiffLlamaConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        rms_norm_eps=1e-6,
        attn_implementation="fixed",
    )
    theirs = _random(diffllama.DiffLlamaAttention(config, layer))
    generator = torch.Generator().manual_seed(0)
    halves, upstream = (
        torch.randn(2, 2, N, heads, width, dtype=torch.float64, generator=generator),
        torch.randn(2, N, heads * width, dtype=torch.float64, generator=generator),
    )
    given = halves.clone().requires_grad_()
    outputs = iter(given.unbind())
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "fixed", lambda *_, **__: (next(outputs), None))
    with torch.no_grad():
        theirs.o_proj.weight.copy_(torch.eye(heads * width))
    with in_float64():
        table = torch.ones(1, N, width, dtype=torch.float64), torch.zeros(1, N, width, dtype=torch.float64)
        expected = theirs(torch.zeros(2, N, heads * width, dtype=torch.float64), table, None)[0]
        (expected * upstream).sum().backward()

    assert initial_lambda(None, layer) == pytest.approx(theirs.lambda_init)
    noise_weight = StaticLambda(width, theirs.lambda_init).double()
    noise_weight.start.fill_(theirs.lambda_init)  # which float32 rounds
    with torch.no_grad():
        noise_weight.q.copy_(torch.stack([theirs.lambda_q1, theirs.lambda_q2]))
        noise_weight.k.copy_(torch.stack([theirs.lambda_k1, theirs.lambda_k2]))
    leaf = halves.clone().requires_grad_()
    signal, noise = torch.cat(leaf.unbind(), dim=-1).chunk(2, dim=2)
    weight, scale = noise_weight(None)
    gamma = torch.ones(2 * width, dtype=torch.float64)
    y = differential_combine(signal, noise, weight, gamma, scale, eps=1e-6).flatten(-2)
    (y * upstream).sum().backward()
    assert_close(y, expected, BOUND)
    assert_close(leaf.grad, given.grad, BOUND, "streams")
    for name, own in (("q", noise_weight.q.grad), ("k", noise_weight.k.grad)):
        both = torch.stack([theirs.get_parameter(f"lambda_{name}{i}").grad for i in (1, 2)])
        assert_close(own, both, BOUND, name)
