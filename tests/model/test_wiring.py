"""What stands between embedding, blocks and head: against its definition, token by token; how it starts."""

import pytest
import torch

from fusedlm import build_model
from fusedlm.config import parse_recipe
from fusedlm.config.train import AdamWConfig
from fusedlm.nn.module import LEAST_SIDE, roles
from fusedlm.optim import build_optimizer, set_learning_rates
from fusedlm.testing import assert_close, part_config, randomise_, wired_config
from tests.config.test_recipe import SMALL

VOCAB, T = 61, 12
TOKENS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(3))
DOCUMENTS = torch.tensor([[0] * T, [0] * 4 + [1] * 7 + [0]])


def _rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _embedded(model, p, tokens, documents):
    """The input of the first block for one sequence."""
    rows = []
    for t, token in enumerate(tokens.tolist()):
        first = t == 0 or documents[t] != documents[t - 1]
        index = 16 if first else (36313 * token ^ 27191 * int(tokens[t - 1])) % 16
        e = p["embedding.weight"][token]
        e = e + p["bigram.scale"] * (p["bigram.project.weight"] @ p["bigram.table.weight"][index])
        rows.append((e * model.embedding_scale, first))
    g = p["smear.gate"].sigmoid()
    return torch.stack(
        [(1 - g) * x + (0 if first else g * rows[t - 1][0]) for t, (x, first) in enumerate(rows)],
    )


def _definition(model, tokens_BT, documents_BT):
    """Logits, from the weights and the mixers and feed-forwards of the blocks."""
    p = dict(model.named_parameters())
    context = model._context(tokens_BT, documents_BT, None, None, None)
    x0 = torch.stack([_embedded(model, p, *row) for row in zip(tokens_BT, documents_BT, strict=True)])
    x, outputs, half = x0, [], len(model.blocks) // 2
    for layer, block in enumerate(model.blocks):
        own = {name.removeprefix(f"blocks.{layer}."): value for name, value in p.items()}
        partner = 2 * half - 1 - layer
        if 0 <= partner < half:
            x = x + own["skip_weight"] * outputs[partner]
        x = own["mix_x"] * x + own["mix_x0"] * x0
        scale = torch.tensor((layer + 1) ** -0.5).double()  # kept in float32
        embedding, hook = getattr(block.mixer, "value_embedding", None), None
        if embedding is not None:  # added to the last rows of the packed projection instead
            block.mixer.value_embedding = None
            rows = p["value_table.weight"][tokens_BT] @ embedding.project.weight.T * embedding.scale
            hook = block.mixer.qkv.register_forward_hook(
                lambda _, __, qkv, v=rows: torch.cat([qkv[..., : -v.shape[-1]], qkv[..., -v.shape[-1] :] + v], dim=-1)
            )
        x = x + block.mixer(_rms(x) * own["mixer_norm.weight"] * scale, context)
        if hook is not None:
            hook.remove()
            block.mixer.value_embedding = embedding
        x = x + block.ffn(_rms(x) * own["ffn_norm.weight"] * scale, context)
        outputs.append(x)
    z = (_rms(x) * p["head.norm.weight"]) @ p["head.weight"].T
    return 23 * ((z + 5) / 7.5).sigmoid()[..., :VOCAB]


@pytest.mark.parametrize("pattern", ["gavgv", "av"])
@torch.no_grad()
def test_is_its_definition(pattern):
    model = randomise_(build_model(wired_config(pattern), vocab_size=VOCAB), seed=4).double().eval()
    for name, p in model.named_parameters():
        if "bigram" in name or "value_" in name or name.endswith(("mix_x0", "head.weight")):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).to(p))  # else of little effect
    found = model(TOKENS, documents=DOCUMENTS).logits
    assert_close(found, _definition(model, TOKENS, DOCUMENTS), 1e-11)


def test_compiles_to_full_graphs():
    torch._dynamo.reset()
    model = randomise_(build_model(wired_config(), vocab_size=VOCAB)).double()

    def gradients():
        model.zero_grad()
        model(TOKENS, documents=DOCUMENTS, targets=TOKENS).total().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    eager = gradients()
    graphs = []
    model.compile_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for name, gradient in gradients().items():
        assert_close(gradient, eager[name], 1e-10, name)
    assert len(graphs) == 6, "bigram, smear, three blocks and the head"


@torch.no_grad()
def test_starts():
    model = build_model(wired_config("avav"), vocab_size=VOCAB, seed=0)
    p = dict(model.named_parameters())
    x = torch.randn(2, 5, 32)
    context = model._context(TOKENS[:, :5], None, None, None, None)
    assert_close(model.smear(x, context)[:, 1:], x[:, 1:] + 0.0474258 * (x[:, :-1] - x[:, 1:]), 1e-6)
    assert not model.bigram(TOKENS[:, :5], context).any() and p["bigram.scale"] == pytest.approx(0.05)
    assert p["bigram.table.weight"].std() == pytest.approx(0.02, rel=0.2)
    assert p["value_table.weight"].std() == pytest.approx(0.01, rel=0.2)
    for layer, block in enumerate(model.blocks):
        assert (block.mix_x == 1).all() and not block.mix_x0.any()
        assert (block.skip_weight == 1).all() if layer >= 2 else not hasattr(block, "skip_weight")
    assert p["blocks.1.mixer.value_embedding.scale"] == pytest.approx(0.1)
    gates = {name for name, role in roles(model).items() if role.kind == "gate"}
    assert {"smear.gate", "bigram.scale", "blocks.3.skip_weight", "blocks.0.mix_x", "blocks.0.mix_x0"} <= gates
    assert "blocks.1.mixer.value_embedding.scale" in gates


def test_a_table_of_values_is_there_for_layers_that_read_it():
    config = wired_config("av")
    one = build_model(config.model_copy(update={"n_layers": 1}), vocab_size=VOCAB)
    assert one.value_table is None and build_model(config, vocab_size=VOCAB).value_table is not None


@torch.no_grad()
def test_orthogonal_starts():
    """Each part of a packed projection; small ones are normal; the variance is that of the normal start."""
    mixer, ffn = "{type: attention, n_heads: 4, n_kv_heads: 1, head_dim: 32}", "{type: relu2, hidden: 160}"
    config = part_config(mixer, ffn, "init: orthogonal").model_copy(update={"dim": 96})
    model = build_model(config, vocab_size=VOCAB, seed=1)
    normal = build_model(config.model_copy(update={"init": "normal"}), vocab_size=VOCAB, seed=1)
    qkv, up = model.blocks[0].mixer.qkv, model.blocks[0].ffn.up
    q, k, _ = (qkv.weight_of(part) for part in "qkv")
    assert_close(q.T @ q, torch.eye(96) * 128 / 96, 1e-5)
    assert_close(up.weight.T @ up.weight, torch.eye(96) * 160 / 96, 1e-5)
    assert k.shape == (32, 96) and (k @ k.T - torch.eye(32)).norm() > 1, "below LEAST_SIDE"
    wide = model.blocks[0].mixer.qkv.__dict__["_declared"]["weight"][1]
    rows = wide._part(LEAST_SIDE, 96, torch.Generator().manual_seed(0))
    assert_close(rows @ rows.T, torch.eye(64), 1e-5)
    assert abs(rows.mean()) < 0.01, "signs are uniform"
    for name, p in normal.named_parameters():
        other = dict(model.named_parameters())[name]
        changed = name.endswith(("qkv.weight", "up.weight"))
        assert torch.equal(other, p) != changed, name


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_has_its_own_rate(tied):
    model = build_model(wired_config("a", unet_skips=False, tie_embeddings=tied), vocab_size=VOCAB)
    rates = {}
    for rate in (None, 0.5):
        optimizer = build_optimizer(model, AdamWConfig(lr=0.01, head_lr=rate), torch.device("cpu"))
        set_learning_rates(optimizer, 0.1)
        rates[rate] = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rates[None][id(p)] == pytest.approx(1e-3)
        assert rates[0.5][id(p)] == pytest.approx(0.05 if name == "head.weight" else 1e-3), name
    assert ("head.weight" in dict(model.named_parameters())) != tied


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.optimizer.head_lr=0.1"], "head_lr=0.1: the head is the token embedding; set"),
        (["model.logit_rescale={}", "model.logit_softcap=9.0"], "logit_softcap=9.0: logits have one cap; remove it or"),
        (["model.unet_skips=true", "model.n_layers=1"], "unet_skips=true: needs at least 2 layers, not n_layers=1"),
        (["model.bigram.rows=1"], "model.bigram.rows: got 1"),
        (["model.init=zero"], "model.init: got 'zero'"),
        (
            [f"model.blocks.{x}={{mixer: {{type: attention, n_heads: 2, value_embedding: {n}}}, ffn: {{type: relu2}}}}"
             for x, n in (("x", 3), ("y", 4))],
            "blocks.y.mixer: value_embedding=4 must be 3 as in another block: all share one table",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(overrides, named):
    with pytest.raises(ValueError, match=named) as caught:
        parse_recipe(SMALL, overrides)
    assert "\n" not in str(caught.value)
