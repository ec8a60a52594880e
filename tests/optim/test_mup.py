"""Maximal update parametrisation: a law at base width, the table of docs/mup.md, scales by definition."""

import dataclasses
import math

import pytest
import torch
import yaml

from fusedlm.config import parse_recipe
from fusedlm.config.model import ModelConfig, MuPConfig
from fusedlm.config.train import AdamWConfig, NorMuonAdamWConfig, NorMuonConfig, RestConfig, SGDConfig
from fusedlm.model import build_model
from fusedlm.nn.module import roles
from fusedlm.nn.mup import widen
from fusedlm.optim import build_optimizer, optimizer_split, parameter_groups
from fusedlm.testing import MIXER_CASES, part_config, randomise_
from tests.config.test_recipe import SMALL

CPU = torch.device("cpu")
HYBRID = """
dim: 64
n_layers: 6
pattern: almgsd
blocks:
  a: {mixer: {type: attention, n_heads: 4, n_kv_heads: 2}, ffn: {type: swiglu}}
  l: {mixer: {type: mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 4}, ffn: {type: routed}}
  m: {mixer: {type: mamba2, n_heads: 4, state_dim: 8, chunk_size: 8}, ffn: {type: relu2, hidden: 40}}
  g: {mixer: {type: gdn, n_heads: 2, chunk_size: 8}, ffn: {type: relu2}}
  s: {mixer: {type: sdla, n_heads: 2, rank: 12, rope_dim: 4, chunk_size: 8}, ffn: {type: relu2}}
  d:
    mixer: {type: diff_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}
    ffn: {type: moe, n_experts: 4, top_k: 2, hidden: 8, z_loss: 0.01}
"""
BASE = 16  # a quarter of the width


def config(text: str = HYBRID, **changes) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load(text) | changes)


# Growth of fan-in by hand, at four times the base width: what is not here does not grow.
GROWN = {
    # Input as wide as the model.
    **{f"blocks.0.{name}": 4.0 for name in ("mixer.qkv", "mixer.out", "ffn.gate_up")},
    **{f"blocks.1.{name}": 4.0 for name in ("mixer.down", "mixer.out")},
    **{f"blocks.1.ffn.{name}": 4.0 for name in ("router", "light.gate_up", "rest.gate_up")},
    **{f"blocks.2.{name}": 4.0 for name in ("mixer.project", "mixer.out", "ffn.up")},
    **{f"blocks.3.{name}": 4.0 for name in ("mixer.qkv", "mixer.gates", "mixer.z", "mixer.out", "ffn.up", "ffn.down")},
    **{f"blocks.4.{name}": 4.0 for name in ("mixer.down", "mixer.write", "mixer.read", "mixer.out")},
    **{f"blocks.4.{name}": 4.0 for name in ("ffn.up", "ffn.down")},
    **{f"blocks.5.{name}": 4.0 for name in ("mixer.down", "mixer.q_up", "mixer.out")},
    **{f"blocks.5.ffn.{name}": 4.0 for name in ("router.project", "experts.up", "shared.gate_up")},
    # Hidden widths are rounded: swiglu has 64 units at width 16 and 192 at 64, of which light has 16 and 40.
    "blocks.0.ffn.down": 3.0,
    "blocks.1.ffn.light.down": 40 / 16,
    "blocks.1.ffn.rest.down": 152 / 48,
    # The vectors whose products give lambda are as wide as a head.
    "blocks.5.mixer.noise_weight.q": 4.0,
    "blocks.5.mixer.noise_weight.k": 4.0,
}
NOT_GROWN = (
    *("blocks.1.mixer.q_up", "blocks.1.mixer.kv_up", "blocks.2.ffn.down", "blocks.4.mixer.qk_up"),
    *("blocks.5.ffn.experts.down", "blocks.5.ffn.shared.down"),
)


def test_rates_and_decay_of_every_parameter_of_a_hybrid_are_those_of_the_table():
    model = build_model(config(mup={"base_width": BASE}, tie_embeddings=False), vocab_size=61, device="meta")
    optimizer = build_optimizer(model, AdamWConfig(lr=0.5, weight_decay=0.25), CPU)
    decayed = {id(parameter) for parameter in parameter_groups(model, 1.0)[0]["params"]}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            key = name.removesuffix(".weight")
            assert group["lr"] == pytest.approx(0.5 / GROWN.get(key, 1.0)), name
            wanted = 0.25 * GROWN.get(key, 1.0) if id(parameter) in decayed else 0.0
            assert group["weight_decay"] == pytest.approx(wanted), name
            seen.add(key)
    assert seen >= {
        *GROWN,
        *NOT_GROWN,
        "embedding",
        "head",
        "head.norm",
        "blocks.3.mixer.conv",
        "blocks.4.mixer.lambda_head",
    }
    assert len(seen) == len(names)


@pytest.mark.parametrize("tied", [True, False])
def test_start_keeps_the_variance_of_embeddings_and_divides_that_of_matrices(tied):
    wide, base = (
        build_model(config(mup={"base_width": BASE}, tie_embeddings=tied, dim=dim), vocab_size=61, device="meta")
        for dim in (4 * 160, 160)
    )
    own = {name: parameter for name, parameter in wide.named_parameters()}
    for (prefix, module), (_, twin) in zip(wide.named_modules(), base.named_modules(), strict=True):
        for name, (role, init) in module.__dict__.get("_declared", {}).items():
            other, other_init = twin.__dict__["_declared"][name]
            if role.kind in ("matrix", "router") and hasattr(init, "std"):
                wanted = other_init.std * math.sqrt(other.fan_in / role.fan_in)
                assert init.std == pytest.approx(wanted), prefix
            else:
                assert init == other_init, prefix
    assert "embedding.weight" in own and wide.embedding_scale == base.embedding_scale
    assert base.embedding.__dict__["_declared"]["weight"][1].std == 0.02


def run(model) -> dict[str, torch.Tensor]:
    """Loss, logits, gradients, and weights after two steps of AdamW."""
    tokens = torch.arange(24).view(2, 12) % 61
    optimizer = build_optimizer(model, AdamWConfig(lr=0.01), CPU)
    found = {}
    for step in range(2):
        loss = model(tokens, targets=tokens.roll(-1, 1)).total()
        loss.backward()
        found |= {f"{step}.{name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
        found[f"{step}.loss"] = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    found["logits"] = model(tokens).logits.detach()
    return found | {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_at_base_width_and_depth_nothing_changes_to_the_last_bit(tied):
    text = HYBRID.replace("dim: 64", "dim: 32")
    one = build_model(config(text, tie_embeddings=tied), vocab_size=61, seed=3)
    two = build_model(config(text, tie_embeddings=tied, mup={"base_width": 32, "base_depth": 6}), vocab_size=61, seed=3)
    assert two.mup is not None
    groups = [build_optimizer(model, AdamWConfig(), CPU).param_groups for model in (one, two)]
    plain = [[{k: v for k, v in g.items() if k != "params"} | {"n": len(g["params"])} for g in one] for one in groups]
    assert plain[0] == plain[1]
    one, two = run(one), run(two)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(two[name], tensor), name


@pytest.mark.parametrize("kind", ["attention", "mla", "diff_mla", "cmd_mla"])
@pytest.mark.parametrize("case", [0, 2])
def test_scores_have_the_scale_of_the_base_at_its_width_and_one_over_the_width_from_there(kind, case):
    """With norms and gains on q and k or without."""
    mixer = (
        build_model(part_config(MIXER_CASES[kind][case], extra="mup: {base_width: 16}"), vocab_size=61).blocks[0].mixer
    )
    rope = 0 if kind == "attention" else mixer.rope[0]
    width, base = mixer.head_dim + rope, mixer.head_dim // 2 + rope
    assert mixer.scale == pytest.approx(base**-0.5 * base / width)
    if kind == "cmd_mla":
        assert mixer.noise_scale == pytest.approx((mixer.noise_dim / 2) ** -0.5 / 2)


def test_features_of_sdla_keep_the_scale_of_the_base():
    """In float64 against a layer whose projections are scaled instead."""
    mixer = "{type: sdla, n_heads: 2, rope_dim: 4, chunk_size: 8}"
    plain, wide = (
        build_model(part_config(mixer, extra=e), vocab_size=61, seed=1) for e in ("", "mup: {base_width: 16}")
    )
    plain, wide = (randomise_(model).double().blocks[0].mixer for model in (plain, wide))
    factor = ((16 + 4) / (8 + 4)) ** 0.25
    with torch.no_grad():
        plain.qk_up.weight.mul_(factor)
        first = list(plain.down.splits).index("k_rope")
        plain.down.weight.split(list(plain.down.splits.values()))[first].mul_(factor)
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    from fusedlm.nn.context import Context

    def forward(layer):
        context = Context(torch.arange(9)[None], False)
        context.add_rope(layer.rope_specs(), torch.float64, None)
        return layer(x, context)

    torch.testing.assert_close(forward(wide), forward(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_divided_by_the_growth_of_the_width(tied):
    """In training, in evaluation and in a step of decoding."""
    extra = f"tie_embeddings: {str(tied).lower()}, embedding_std: 0.02, logit_softcap: 5.0"
    models = [
        build_model(part_config("{type: gdn, n_heads: 2}", extra=f"{extra}, {mup}"), vocab_size=61, seed=1)
        for mup in ("mup: null", "mup: {base_width: 8}")
    ]
    plain, wide = (randomise_(model) for model in models)
    with torch.no_grad():
        plain.head.norm.weight.div_(4)
    tokens = torch.arange(10).view(1, 10)
    for options in ({}, {"targets": tokens}):
        one, two = plain(tokens, **options), wide(tokens, **options)
        found = (one.logits, two.logits) if not options else (one.nll, two.nll)
        torch.testing.assert_close(*found)
    with torch.no_grad():
        steps = [model(tokens[:, :1], state=model.init_state(1)).logits for model in (plain, wide)]
    torch.testing.assert_close(*steps)


def test_depth_scales_branches_and_with_a_smaller_exponent_rates():
    text = "{type: attention, n_heads: 2}"
    plain, deep = (
        build_model(part_config(text, extra=f"n_layers: 2, {mup}"), vocab_size=61, seed=1).double()
        for mup in ("mup: null", "mup: {base_width: 32, base_depth: 1, depth_exponent: 0.5}")
    )
    plain, deep = randomise_(plain), randomise_(deep)
    with torch.no_grad():
        for block in plain.blocks:
            for linear in (block.mixer.out, block.ffn.down):
                linear.weight.mul_(2**-0.5)
    tokens = torch.arange(10).view(1, 10)
    torch.testing.assert_close(plain(tokens).logits, deep(tokens).logits, rtol=1e-10, atol=1e-10)
    rates = {name: deep.mup.adam_rate(name) for name, _ in deep.named_parameters()}
    for name, rate in rates.items():
        assert rate == pytest.approx(2**-0.5 if name.startswith("blocks") else 1.0), name
    assert dataclasses.replace(deep.mup, depth_exponent=1.0).adam_rate("blocks.0.mixer.qkv.weight") == 1.0


def test_numbers_at_base_width_say_what_grows():
    """Heads of a fixed width, more of them, and a hidden width that is a number."""
    block = "{mixer: {type: attention, n_heads: 8, n_kv_heads: 1, head_dim: 8}, ffn: {type: relu2, hidden: 192}}"
    tree = f"{{dim: 64, n_layers: 1, pattern: a, blocks: {{a: {block}}}}}"
    base = {"blocks.a.mixer.n_heads": 2, "blocks.a.ffn.hidden": 48}
    model = build_model(config(tree, mup={"base_width": 16, "base": base}), vocab_size=61, device="meta")
    growth = {name: one.fan_in for name, one in model.mup.growth.items()}
    assert growth["blocks.0.mixer.out.weight"] == growth["blocks.0.ffn.down.weight"] == 4.0
    assert model.blocks[0].mixer.scale == 8**-0.5
    without = build_model(config(tree, mup={"base_width": 16}), vocab_size=61, device="meta")
    assert without.mup.growth["blocks.0.ffn.down.weight"].fan_in == 1.0


def test_hidden_matrices_under_normuon_have_one_rate_and_the_rest_that_of_adam():
    model = build_model(config(mup={"base_width": BASE}, tie_embeddings=False), vocab_size=61)
    settings = NorMuonAdamWConfig(matrix=NorMuonConfig(lr=0.03), rest=RestConfig(lr=0.01, head_lr=0.02))
    optimizer = build_optimizer(model, settings, CPU)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, role in roles(model).items():
        own = {"matrix": 0.03, "head": 0.02}.get(role.kind, 0.01)
        assert rates[name] == (own if role.kind == "matrix" else own * model.mup.adam_rate(name)), name
    assert rates["blocks.1.ffn.router.weight"] == 0.01 / 4  # a router's rate falls with the width
    split = optimizer_split(optimizer)
    assert sorted(name for names in split.values() for name in names) == sorted(rates)
    shape = NorMuonAdamWConfig(matrix=NorMuonConfig(scaling="shape"))
    with pytest.raises(ValueError, match="scaling=shape: model.mup goes with scaling=spectral alone"):
        build_optimizer(model, shape, CPU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.mup={base_width: 15}"], "model: mup.base_width=15: at that width, blocks.g.mixer: n_heads=2 does not"),
        (["model.mup={base_width: 16, base: {blocks.g.mixer.type: 4}}"], "mup.base: 'blocks.g.mixer.type' is no"),
        (["model.mup={base_width: 16, base: {blocks.x.y: 4}}"], "model: mup.base: 'blocks.x.y' is no number of the"),
        (
            ["model.mup={base_width: 16}", "train.optimizer={type: sgd}"],
            "train.optimizer.type=sgd: model.mup has no rule for it; use adamw, or remove model.mup",
        ),
        (
            ["model.mup={base_width: 16}", "train.optimizer={type: muon_adamw, matrix: {scaling: rms}}"],
            "train.optimizer.matrix.scaling=rms: model.mup goes with spectral alone; set it, or remove model.mup",
        ),
    ],
)
def test_what_has_no_rule_is_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError) as caught:
        parse_recipe(SMALL, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_with_other_parameters_and_a_scaling_without_rule_are_refused():
    models = [build_model(config(n_layers=n), vocab_size=61, device="meta") for n in (1, 2)]
    with pytest.raises(ValueError, match="parameter blocks.1.ffn.light.down.weight is in only one of the model and"):
        widen(*models, [])
    model = build_model(config(mup={"base_width": BASE}), vocab_size=61, device="meta")
    assert model.mup.orthogonal_rate("blocks.0.mixer.qkv.weight", "spectral") == 1.0
    with pytest.raises(ValueError, match="scaling=rms: model.mup goes with scaling=spectral alone"):
        model.mup.orthogonal_rate("blocks.0.mixer.qkv.weight", "rms")
    with pytest.raises(ValueError, match="model.mup has no rule for it"):
        build_optimizer(model, SGDConfig(), CPU)
    assert roles(model).keys() == model.mup.growth.keys()
    assert MuPConfig(base_width=4).depth_exponent == 1.0
