"""The mixture of experts against a loop over tokens and experts in float64, its routing, losses and account."""

import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.flop_counter import FlopCounterMode

from fusedlm.config.ffn import MoEConfig
from fusedlm.model.accounting import count_parameters, training_flops_per_token
from fusedlm.model.cast_weights import CastWeights
from fusedlm.nn.context import Context
from fusedlm.nn.ffn.moe import MoE
from fusedlm.nn.ffn.router import is_highest, router_z_loss, sequence_balance_loss
from fusedlm.nn.module import init_weights, roles
from fusedlm.optim.stacks import parts_of, stacked
from fusedlm.testing import FFN_CASES, assert_close, part_model, randomise_

ATTENTION = "{type: attention, n_heads: 4}"
CASES = [case for case in FFN_CASES["moe"] if "n_experts: 0" not in case]
EMPTY = "{type: moe, n_experts: 32, top_k: 2, hidden: 8, n_groups: 8, n_limited_groups: 1}"


def moe(case: str = CASES[0], seed: int = 0) -> MoE:
    """With a bias that changes the selection."""
    arguments = MoEConfig.model_validate(yaml.safe_load(case)).model_dump(exclude={"type"})
    layer = MoE(dim=32, **arguments)
    init_weights(layer, seed)
    layer = randomise_(layer).double()
    layer.router.bias.copy_(torch.linspace(-0.2, 0.2, layer.n_experts)[torch.randperm(layer.n_experts)])
    return layer


def inputs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 32, dtype=torch.float64, generator=generator).requires_grad_()


def activate(u: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    if activation == "relu2":
        return F.leaky_relu(u, slope).square()
    gate, up = u.chunk(2, dim=-1)
    return F.silu(gate) * up


def chosen(layer: MoE, biased: list[float]) -> list[int]:
    """By definition, one token at a time: the best groups, then the best experts in them."""
    router = layer.router
    size = len(biased) // router.n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(router.n_groups)]
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: router.n_limited_groups] for e in group]
    return sorted(allowed, key=lambda e: -biased[e])[: router.top_k]


def naive(layer: MoE, x_BTD: torch.Tensor, indices_NK: torch.Tensor | None = None) -> torch.Tensor:
    """indices_NK: the experts of each token; None: those of `chosen`."""
    router, experts = layer.router, layer.experts
    rows = []
    for n, x in enumerate(x_BTD.flatten(0, 1)):
        scores = torch.sigmoid(router.project.weight @ x)
        picked = chosen(layer, (scores + router.bias).tolist()) if indices_NK is None else indices_NK[n].tolist()
        total = sum(scores[e] for e in picked) if len(picked) > 1 else 1.0
        y = torch.zeros(32, dtype=x.dtype) if layer.shared is None else layer.shared(x[None])[0]
        for e in picked:
            hidden = activate(experts.up[e] @ x, experts.activation, experts.slope)
            y = y + router.scaling * scores[e] / total * (experts.down[e] @ hidden)
        rows.append(y)
    return torch.stack(rows).view_as(x_BTD)


def gradients(y: torch.Tensor, x: torch.Tensor, layer: MoE) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    names = dict(layer.named_parameters())
    found = torch.autograd.grad((y * weights).sum(), [x, *names.values()], materialize_grads=True)
    return dict(zip(["x", *names], found, strict=True))


def check(layer: MoE, x: torch.Tensor, expected: torch.Tensor) -> None:
    y, _ = layer(x)
    assert_close(y, expected, 1e-10)
    actual = gradients(y, x, layer)
    for name, gradient in gradients(expected, x, layer).items():
        assert_close(actual[name], gradient, 1e-10, name)


@pytest.mark.parametrize("case", [*CASES, EMPTY])
@pytest.mark.parametrize("shape", [(2, 13), (1, 1)])
def test_equals_a_loop_over_tokens_and_experts(case, shape):
    """One token uses few experts, and the last case leaves most of them empty."""
    layer, x = moe(case), inputs(*shape)
    loads = layer(x)[1].metrics["moe"]
    assert (loads == 0).any() or shape != (1, 1) and case != EMPTY
    check(layer, x, naive(layer, x))


@pytest.mark.parametrize("case", CASES)
def test_all_tokens_on_the_same_experts(case):
    layer, x = moe(case), inputs(2, 13)
    first = torch.arange(layer.n_experts) < layer.top_k  # of the first group where there are groups
    layer.router.bias.copy_(torch.where(first, 5.0, -5.0))
    loads = layer(x)[1].metrics["moe"]
    assert loads.tolist() == [26 if taken else 0 for taken in first]
    check(layer, x, naive(layer, x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tie", ["scores", "saturated"])
def test_ties(case, tie):
    """Equal scores: any choice will do, of different experts, with the same weights for all."""
    layer, x = moe(case), inputs(2, 13)
    layer.router.bias.zero_()
    with torch.no_grad():
        if tie == "scores":
            layer.router.project.weight.zero_()
        else:  # scores of exactly 1
            x = (x.abs() + 1).requires_grad_()
            layer.router.project.weight.fill_(100.0)
    routing = layer.router(x.flatten(0, 1))
    for row in routing.indices_NK.tolist():
        assert len(set(row)) == layer.top_k and set(row) <= set(range(layer.n_experts))
    assert len(routing.weights_NK.unique()) == 1
    check(layer, x, naive(layer, x, routing.indices_NK))


def test_the_bias_selects_and_does_nothing_else():
    """Weights are functions of the unbiased scores, and no gradient depends on the bias."""
    layer, x = moe(), inputs(2, 13)
    with torch.no_grad():
        before = layer.router(x.flatten(0, 1))
        layer.router.bias += 0.05  # a common shift
        after = layer.router(x.flatten(0, 1))
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)
        layer.router.bias[3] += 10
        moved = layer.router(x.flatten(0, 1))
    assert (moved.indices_NK == 3).any(-1).all() and not (before.indices_NK == 3).any(-1).all()
    assert torch.equal(moved.scores_NE, before.scores_NE)
    expected = moved.scores_NE.gather(-1, moved.indices_NK)
    assert_close(moved.weights_NK, expected / expected.sum(-1, keepdim=True), 1e-14)
    assert layer.router.bias.requires_grad is False and "router.bias" in layer.state_dict()
    check(layer, x, naive(layer, x))


def test_the_only_expert_of_a_token_teaches_the_router():
    layer, x = moe(CASES[2]), inputs(2, 13)
    assert layer.top_k == 1
    assert gradients(layer(x)[0], x, layer)["router.project.weight"].abs().max() > 1e-3


def test_groups_are_chosen_by_their_two_best():
    layer = moe("{type: moe, n_experts: 6, top_k: 2, hidden: 4, n_groups: 2, n_limited_groups: 1}")
    biased = torch.tensor([[9.0, 0.0, 0.0, 5.0, 5.0, 1.0], [9.0, 3.0, 2.0, 5.0, 5.0, 5.0]]).double()
    assert layer.router.select(biased).sort(-1).values.tolist() == [[3, 4], [0, 1]]
    layer.router.n_limited_groups = 2
    assert layer.router.select(biased).sort(-1).values[0, 0] == 0
    below_zero = biased - 20  # an excluded group is not 0, which would be above these
    layer.router.n_limited_groups = 1
    assert layer.router.select(below_zero).sort(-1).values[0].tolist() == [3, 4]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_selection_under_compile(case, tied):
    """torch.compile runs another form of it: the same experts, and different ones of equal scores."""
    torch._dynamo.reset()
    layer = moe(case)
    scores = torch.rand(40, layer.n_experts, generator=torch.Generator().manual_seed(0))
    scores = scores.round() if tied else scores
    eager = layer.router.select(scores)
    compiled = torch.compile(layer.router.select, fullgraph=True, backend="eager")(scores)
    assert compiled.dtype == eager.dtype and compiled.shape == eager.shape
    if tied:
        assert all(len(set(row)) == layer.top_k for row in compiled.tolist())
        assert torch.equal(scores.gather(-1, compiled).sum(-1), scores.gather(-1, eager).sum(-1))
    else:
        assert torch.equal(compiled, eager)
    counted = torch.compile(is_highest, fullgraph=True, backend="eager")(scores, layer.top_k)
    assert (counted.sum(-1) == layer.top_k).all()
    assert tied or torch.equal(counted, is_highest(scores, layer.top_k))


def test_scores_are_float32_under_autocast():
    layer, x = moe().float(), inputs(3, 29).float()
    exact = layer.router(x.flatten(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        routing = layer.router(x.flatten(0, 1))
        y, report = layer(x)
    assert torch.equal(routing.logits_NE, exact.logits_NE) and routing.weights_NK.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert torch.equal(report.metrics["moe"], layer(x)[1].metrics["moe"])


def test_the_selection_is_counted():
    layer, x = moe(), inputs(2, 13)
    context = Context(torch.arange(13)[None])
    context.select = torch.tensor([3, 4, 19])
    counted = torch.zeros(8, dtype=torch.int64)
    for row in layer.router(x.flatten(0, 1)).indices_NK[context.select].tolist():
        counted[row] += 1
    assert torch.equal(layer(x, context)[1].metrics["moe"], counted) and counted.sum() == 6


def test_losses_by_definition():
    logits = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores, expected = logits.sigmoid(), 0.0
    for sequence in scores:
        for e in range(5):
            share = sum(token[e] / token.sum() for token in sequence) / 7
            often = sum(e in sorted(range(5), key=lambda i: -token[i])[:2] for token in sequence)
            expected = expected + 5 / (2 * 7) * often * share / 3
    found = sequence_balance_loss(logits, top_k=2)
    assert_close(found, expected, 1e-12)
    assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)), 1e-12)
    even = torch.eye(4, dtype=torch.float64)[None] + 0.1
    assert sequence_balance_loss(even, top_k=1).item() == pytest.approx(1.0)
    one_sided = torch.tensor([40.0, -40, -40, -40]).double().expand(1, 8, 4)
    assert sequence_balance_loss(one_sided, top_k=1).item() == pytest.approx(4.0)
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    assert router_z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


@pytest.mark.parametrize("logit", [-30.0, -90.0, -104.0, -1000.0, 30.0, 1000.0])
def test_extreme_logits(logit):
    """Scores of 0 and of 1: the weights are their quotients, and no gradient is infinite or NaN."""
    layer = moe("{type: moe, n_experts: 4, top_k: 2, hidden: 16, sequence_loss: 0.5}").float()
    layer.router.bias.zero_()
    offsets = torch.tensor([0.0, 1.0, 2.0, -1.0])
    with torch.no_grad():  # logits are the first element of a token times the weight
        layer.router.project.weight.zero_()
        layer.router.project.weight[:, 0] = logit + offsets
    x = torch.zeros(1, 3, 32)
    x[..., 0] = 1.0
    y, report = layer.train()(x.requires_grad_())
    weights = layer.router(x.flatten(0, 1)).weights_NK
    chosen = layer.router.select(torch.full((3, 4), logit).add(offsets).sigmoid())
    scores = (logit + offsets.double()).sigmoid()
    if logit < -700:  # in float64 too scores are 0: their quotient is that of their logarithms
        scores = offsets.double().exp()
    expected = scores[chosen] / scores[chosen].sum(-1, keepdim=True)
    assert_close(weights, expected, 1e-5)
    (y.sum() + report.losses["moe_sequence"].value).backward()
    for name, parameter in [("x", x), *layer.named_parameters()]:
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_losses_are_those_of_training():
    layer, x = moe("{type: moe, n_experts: 8, top_k: 2, hidden: 16, sequence_loss: 0.5, z_loss: 0.25}"), inputs(3, 9)
    routing = layer.router(x.flatten(0, 1))
    losses = layer.train()(x)[1].losses
    assert {name: loss.per for name, loss in losses.items()} == {"moe_sequence": "batch", "moe_z": "batch"}
    expected = 0.5 * sequence_balance_loss(routing.logits_NE.view(3, 9, 8), 2)
    assert_close(losses["moe_sequence"].value, expected, 1e-14)
    assert_close(losses["moe_z"].value, 0.25 * router_z_loss(routing.logits_NE), 1e-14)
    assert layer.eval()(x)[1].losses == {} and moe(CASES[1]).train()(x)[1].losses == {}


def test_without_experts_it_is_the_dense_feed_forward():
    for activation, kind in (("swiglu", "swiglu"), ("relu2", "relu2")):
        case = f"{{type: moe, n_experts: 0, top_k: 2, hidden: 16, n_shared: 1, activation: {activation}}}"
        model, dense = part_model(ATTENTION, case), part_model(ATTENTION, f"{{type: {kind}, hidden: 48}}")
        tokens = torch.arange(20).view(2, 10)
        randomise_(dense), randomise_(model)
        assert torch.equal(model(tokens).logits, model(tokens).logits) and model(tokens).metrics == {}
        names = {name.replace("ffn.shared.", "ffn."): p for name, p in model.named_parameters()}
        dense.load_state_dict({n: names.get(n, t) for n, t in dense.state_dict().items()})
        assert torch.equal(dense(tokens).logits, model(tokens).logits)
        count = count_parameters(model)
        assert count == count_parameters(dense) and count.active == count.total


@pytest.mark.parametrize("case", CASES)
def test_account(case):
    """FLOPs and active parameters are those of the experts that tokens use."""
    layer, x = moe(case), inputs(2, 13)
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(x)
    assert counter.get_total_flops() == layer.flops(26)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * layer.flops(26)
    model = part_model(ATTENTION, case)
    count = count_parameters(model)
    idle = (layer.n_experts - layer.top_k) * (layer.experts.up[0].numel() + layer.experts.down[0].numel())
    assert count.active == count.total - 2 * idle
    more = part_model(ATTENTION, case.replace(f"n_experts: {layer.n_experts}", f"n_experts: {2 * layer.n_experts}"))
    router = 6 * 2 * 32 * layer.n_experts
    assert training_flops_per_token(more, 8) == training_flops_per_token(model, 8) + router


def test_figures_of_loads():
    layers = [moe(), moe(CASES[2])]
    figures = MoE.summarise(layers, [[4, 4, 4, 4, 4, 4, 4, 4], [0, 3, 9, 0, 0, 0, 0, 0]])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(3)
    assert figures["moe_layers"] == [[pytest.approx(1.0), 1.0, 0], [pytest.approx(entropy), 9 / 4, 1]]
    assert figures["moe_entropy"] == pytest.approx((1 + entropy) / 2)
    assert figures["moe_max_load"] == 9 / 4 and figures["moe_dead"] == 1
    assert MoE.summarise([layers[1]], [[0, 0, 0]])["moe_layers"] == [[0.0, 0.0, 3]]


def test_metrics_of_layers_with_different_numbers_of_experts():
    """Also beside a layer of the same type that has none."""
    blocks = {"a": CASES[0], "b": "{type: moe, n_experts: 0, top_k: 2, hidden: 16}", "c": CASES[2]}
    extra = ", ".join(f"{name}: {{mixer: {ATTENTION}, ffn: {ffn}}}" for name, ffn in blocks.items())
    model = part_model(ATTENTION, extra=f"blocks: {{{extra}}}, pattern: abc, n_layers: 3")
    metrics = model(torch.arange(10)[None]).metrics["moe"]
    assert metrics.shape == (2, 8) and metrics.sum(1).tolist() == [20, 10] and not metrics[1, 3:].any()
    assert len(model.summarise({"moe": metrics})["moe_layers"]) == 2


def test_every_expert_is_a_matrix_of_its_own_to_muon():
    layer = moe().float()
    found = roles(layer)
    parts = parts_of(layer.experts.up, found["experts.up"].splits)
    parts += parts_of(layer.experts.down, found["experts.down"].splits)
    assert {(stack.rows, stack.columns): len(stack.parts) for stack in stacked(parts)} == {(16, 32): 2 * 8, (32, 16): 8}


def test_orthogonal_start_of_every_expert():
    case = "{type: moe, n_experts: 3, top_k: 1, hidden: 70}"
    model = part_model("{type: attention, n_heads: 4}", case, extra="dim: 96, init: orthogonal")
    up = model.blocks[0].ffn.experts.up
    for expert in up:
        for part in expert.split(70):
            assert_close(part @ part.T, torch.eye(70), 1e-5)
    assert not torch.equal(up[0], up[1]) and not model.blocks[0].ffn.experts.down.any()


def test_decoding_casts_experts_once():
    model = part_model(ATTENTION, CASES[0])
    with CastWeights(model, torch.bfloat16).in_use():
        dtypes = {name: parameter.dtype for name, parameter in model.blocks[0].ffn.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"router.project.weight"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


REFUSED = [
    ("n_experts: 8, top_k: 9", "top_k=9 is more than the 8 experts; lower top_k"),
    ("n_experts: 8, top_k: 3, n_groups: 4, n_limited_groups: 1", "top_k=3 is more than the 2 experts in 1 of 4 groups"),
    ("n_experts: 8, top_k: 2, n_groups: 3", "n_groups=3 does not divide n_experts=8"),
    ("n_experts: 8, top_k: 2, n_groups: 2, n_limited_groups: 3", "n_limited_groups=3 is more than n_groups=2"),
    ("n_experts: 8, top_k: 2, slope: 0.5", "slope=0.5 is for activation=relu2, not swiglu"),
    ("n_experts: 8, top_k: 0", "greater than 0"),
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig.model_validate(yaml.safe_load(f"{{type: moe, hidden: 16, {keys}}}"))


def test_no_routed_expert_needs_no_valid_routing():
    keys = "n_experts: 0, top_k: 9, hidden: 16, n_groups: 3"
    assert MoEConfig.model_validate(yaml.safe_load(f"{{type: moe, {keys}}}")).top_k == 9


@pytest.mark.parametrize("case", CASES)
def test_compiled_in_one_graph(case):
    """Whatever the loads are."""
    torch._dynamo.reset()
    eager, compiled = (randomise_(part_model(ATTENTION, case)) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in compiled.blocks:
        block.compile(fullgraph=True, backend=count)
    for seed in range(2):
        tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(seed))
        outputs = [model.train()(tokens, targets=tokens) for model in (eager, compiled)]
        for model, output in zip((eager, compiled), outputs, strict=True):
            model.zero_grad()
            output.total().backward()
            model.blocks[0].ffn.router.balance(output.metrics["moe"][0], torch.tensor(True))
        assert torch.equal(outputs[0].metrics["moe"], outputs[1].metrics["moe"])
        for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert_close(other.grad, one.grad, 1e-5, name)
    assert len(graphs) == 1
