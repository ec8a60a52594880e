"""Every parameter of every recipe has exactly one role, and roles say what they should."""

import inspect
import math
from functools import partial

import pytest
import torch

from fusedlm.config.ffn import MoEConfig, ReLU2Config, RoutedConfig, SwiGLUConfig
from fusedlm.config.mixers import (
    AttentionConfig,
    CMDMLAConfig,
    DiffMLAConfig,
    GDNConfig,
    Mamba2Config,
    MLAConfig,
    SDLAConfig,
)
from fusedlm.config.model import ModelConfig, YaRNConfig
from fusedlm.model import Decoder
from fusedlm.nn.ffn import FFNS
from fusedlm.nn.linear import Linear
from fusedlm.nn.mixers import MIXERS
from fusedlm.nn.mixers.latent import LatentMixer
from fusedlm.nn.module import KINDS, Constant, Module, Role, roles
from fusedlm.nn.rope import YaRN
from fusedlm.optim import parameter_groups
from fusedlm.testing import FFN_CASES, MIXER_CASES, part_model
from tests.laws.models import ALL_MODELS


@ALL_MODELS
def test_every_parameter_has_one_role(make):
    model = make()
    found = roles(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, role in found.items():
        parameter = dict(model.named_parameters())[name]
        if role.kind in ("matrix", "router", "head", "embedding"):
            stacked = (len(parameter),) if ".experts." in name else ()
            assert parameter.shape == (*stacked, role.fan_out, role.fan_in), name
        if role.splits:
            assert sum(rows for _, rows in role.splits) == role.fan_out, name
            assert all(rows > 0 for _, rows in role.splits), name


KINDS_OF = [
    ("attention", "{type: attention, n_heads: 4}", {"mixer.q_gain": "per_head", "mixer.qkv.weight": "matrix"}),
    ("value residual", MIXER_CASES["attention"][5], {"mixer.value_residual.gate": "gate"}),
    ("gain per dimension", MIXER_CASES["attention"][6], {"mixer.q_gain": "gain", "mixer.k_gain": "gain"}),
    ("mla", MIXER_CASES["mla"][1], {"mixer.q_norm.weight": "gain", "mixer.kv_up.weight": "matrix"}),
    (
        "diff_mla",
        MIXER_CASES["diff_mla"][0],
        {"mixer.noise_weight.q": "lambda", "mixer.noise_weight.k": "lambda", "mixer.gamma": "gain"},
    ),
    ("diff_mla, token", MIXER_CASES["diff_mla"][2], {"mixer.noise_weight.project.weight": "matrix"}),
    ("cmd_mla", MIXER_CASES["cmd_mla"][0], {"mixer.lambda_q": "lambda", "mixer.lambda_k": "lambda"}),
    (
        "gdn",
        MIXER_CASES["gdn"][0],
        {"mixer.conv.weight": "convolution", "mixer.log_rate": "per_head", "mixer.dt_bias": "per_head"},
    ),
    (
        "sdla",
        MIXER_CASES["sdla"][0],
        {"mixer.decay_bias": "bias", "mixer.lambda_head": "lambda", "mixer.lambda_layer": "lambda"},
    ),
    ("mamba2", MIXER_CASES["mamba2"][0], {"mixer.skip": "per_head", "mixer.norm.weight": "gain"}),
]


@pytest.mark.parametrize("case, expected", [row[1:] for row in KINDS_OF], ids=[row[0] for row in KINDS_OF])
def test_roles_of_mixers(case, expected):
    found = roles(part_model(case))
    for name, kind in expected.items():
        assert found[f"blocks.1.{name}"].kind == kind


def test_roles_of_the_rest():
    found = roles(part_model(MIXER_CASES["attention"][0], FFN_CASES["routed"][0]))
    assert found["embedding.weight"].kind == "embedding" and "head.weight" not in found
    assert found["blocks.0.ffn.router.weight"].kind == "router"
    assert found["blocks.0.ffn.light.gate_up.weight"].splits == (("gate", 24), ("up", 24))
    experts = roles(part_model(MIXER_CASES["attention"][0], FFN_CASES["moe"][0]))
    assert experts["blocks.0.ffn.router.project.weight"].kind == "router"
    assert experts["blocks.0.ffn.experts.up"].splits == (("gate", 16), ("up", 16))
    assert experts["blocks.0.ffn.experts.down"].kind == "matrix"
    assert found["head.norm.weight"].kind == "gain"
    untied = roles(part_model(MIXER_CASES["attention"][0], extra="tie_embeddings: false"))
    assert untied["head.weight"].kind == "head" and untied["embedding.weight"].kind == "embedding"


def test_splits_are_the_parts_of_a_packed_projection():
    mixer = part_model("{type: attention, n_heads: 4, n_kv_heads: 2}").blocks[0].mixer
    assert mixer.qkv.splits == {"q": 32, "k": 16, "v": 16}
    x = torch.randn(3, 32)
    parts = mixer.qkv(x).split([32, 16, 16], dim=-1)
    for name, part in zip(mixer.qkv.splits, parts, strict=True):
        torch.testing.assert_close(mixer.qkv(x, part=name), part)
    latent = part_model("{type: mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6}").blocks[0].mixer
    assert latent.down.splits == {"q": 20, "kv": 12, "k_rope": 6}
    assert latent.kv_up.splits == {"k": 32, "v": 32}


@ALL_MODELS
def test_weight_decay_reads_roles(make):
    """Matrices and routers, whatever their shape; nothing else, whatever its shape."""
    model = make()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.3)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    kept = {names[id(p)] for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert decayed == {name for name, role in roles(model).items() if role.kind in ("matrix", "router")}
    for part in (
        "lambda_q",
        "lambda_k",
        "noise_weight.q",
        "noise_weight.k",
        "conv.weight",
        "embedding.weight",
        "head.",
    ):
        assert not any(part in name for name in decayed), part


def test_a_parameter_without_a_role_is_told():
    model = part_model(MIXER_CASES["attention"][0])
    model.blocks[0].mixer.out = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(ValueError, match="parameter blocks.0.mixer.out.weight has no role; declare it"):
        roles(model)

    class Twice(Module):
        def __init__(self):
            super().__init__()
            self.add_parameter("a", (2,), Role("gain"), Constant(1.0))
            self.other = Module()
            self.other.add_parameter("b", (2,), Role("bias"), Constant(0.0))
            self.other.b = self.a

    with pytest.raises(ValueError, match="parameter a has 2 roles"):
        roles(Twice())
    with pytest.raises(ValueError, match="role 'weight' is not one of embedding, head"):
        Role("weight")
    assert set(KINDS) >= {"embedding", "head", "matrix", "router", "gain", "lambda", "convolution"}


@ALL_MODELS
def test_matrices_start_with_the_variance_of_their_fan_in(make):
    """N(0, 1 / fan_in), or zero where they write into the residual stream, so that every block is the identity."""
    torch.manual_seed(0)
    model = make()
    own = dict(model.named_parameters())
    for name, role in roles(model).items():
        if role.kind != "matrix":
            continue
        parameter = own[name]
        if (
            name.endswith(
                (
                    "mixer.out.weight",
                    "down.weight",
                    "experts.down",
                    "noise_weight.project.weight",
                    "bigram.project.weight",
                )
            )
            and ".mixer.down" not in name
        ):
            assert not parameter.any(), name
        else:
            spread = parameter.numel() ** -0.5
            assert parameter.std().item() * math.sqrt(role.fan_in) == pytest.approx(1, abs=5 * spread), name
            assert abs(parameter.mean().item()) * math.sqrt(role.fan_in) < 5 * spread, name


def test_a_blocks_start_is_the_identity():
    for case in (cases[0] for cases in MIXER_CASES.values()):
        model = part_model(case)
        x = model.embedding(torch.arange(9)[None]) * model.embedding_scale
        seen = []
        model.blocks[-1].register_forward_hook(partial(_keep, seen))
        model(torch.arange(9)[None])
        assert torch.equal(seen[0], x), case


def _keep(seen: list, block, inputs, output) -> None:
    seen.append(output[0])


CONFIGS = [
    (AttentionConfig, MIXERS["attention"]),
    (MLAConfig, LatentMixer),
    (DiffMLAConfig, MIXERS["diff_mla"]),
    (CMDMLAConfig, MIXERS["cmd_mla"]),
    (GDNConfig, MIXERS["gdn"]),
    (SDLAConfig, MIXERS["sdla"]),
    (Mamba2Config, MIXERS["mamba2"]),
    (SwiGLUConfig, FFNS["swiglu"]),
    (ReLU2Config, FFNS["relu2"]),
    (RoutedConfig, FFNS["routed"]),
    (MoEConfig, FFNS["moe"]),
    (ModelConfig, Decoder),
    (YaRNConfig, YaRN),
]


@pytest.mark.parametrize("config, module", CONFIGS, ids=lambda c: c.__name__)
def test_modules_have_the_defaults_of_the_recipe(config, module):
    """nn takes plain arguments, so its defaults stand there too."""
    arguments = inspect.signature(module.__init__).parameters
    compared = 0
    for name, field in config.model_fields.items():
        if name in arguments and not field.is_required():
            assert arguments[name].default == field.default, name
            compared += 1
    assert compared > 0


def test_linear_refuses_splits_that_do_not_fit():
    with pytest.raises(ValueError, match="do not sum to out_features=12"):
        Linear(4, 12, splits={"a": 4, "b": 4})
