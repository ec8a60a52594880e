"""The routed feed-forward against a formula that computes every branch for every token, and what it saves."""

import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.flop_counter import FlopCounterMode

from fusedlm.config.ffn import RoutedConfig
from fusedlm.model import build_model
from fusedlm.model.accounting import count_parameters, training_flops_per_token
from fusedlm.nn.context import Context
from fusedlm.nn.ffn.routed import RoutedFFN
from fusedlm.testing import assert_close, part_config, part_model, randomise_

ATTENTION = "{type: attention, n_heads: 4}"
CASES = [
    "{type: routed, hidden: 64}",
    "{type: routed, hidden: 40, light: 0.6, low: 0.5, high: 0.6, n_classes: 2, budget: 0.7, budget_weight: 3.0}",
    "{type: routed, low: 0.0, high: 1.0, n_classes: 16}",
]


def routed(case: str = CASES[0]) -> RoutedFFN:
    torch.manual_seed(0)
    return randomise_(part_model(ATTENTION, case)).double().blocks[0].ffn


def inputs(batch=3, n=29) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, n, 32, dtype=torch.float64, generator=generator).requires_grad_()


def force(ffn: RoutedFFN, level: str) -> RoutedFFN:
    """Move the thresholds so that every token falls on one level."""
    ffn.low, ffn.high = {"light": (2.0, 3.0), "blend": (-1.0, 2.0), "full": (-3.0, -2.0)}[level]
    return ffn


def full_ffn(ffn: RoutedFFN, x_BTD: torch.Tensor) -> torch.Tensor:
    """The full feed-forward: one SwiGLU that holds the hidden units of both parts."""
    gates, ups = zip(*(part.gate_up.weight.chunk(2) for part in (ffn.light, ffn.rest)), strict=True)
    down = torch.cat([part.down.weight for part in (ffn.light, ffn.rest)], dim=1)
    return (F.silu(x_BTD @ torch.cat(gates).T) * (x_BTD @ torch.cat(ups).T)) @ down.T


def dense(ffn: RoutedFFN, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and difficulty by definition: both branches for every token, the level chosen afterwards."""
    p = torch.softmax(x_BTD @ ffn.router.weight.T, dim=-1)
    difficulty = torch.special.entr(p).sum(-1, keepdim=True) / math.log(p.shape[-1])
    light, full = ffn.light(x_BTD), full_ffn(ffn, x_BTD)
    share = (difficulty - ffn.low) / (ffn.high - ffn.low)
    blend = (1 - share) * light + share * full
    y = torch.where(difficulty < ffn.low, light, torch.where(difficulty > ffn.high, full, blend))
    return y, difficulty.squeeze(-1)


def gradients(y: torch.Tensor, x: torch.Tensor, ffn: RoutedFFN) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    names = dict(ffn.named_parameters())
    found = torch.autograd.grad((y * weights).sum(), [x, *names.values()], materialize_grads=True)
    return dict(zip(["x", *names], found, strict=True))


@pytest.mark.parametrize("level", [None, "light", "blend", "full"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(3, 29), (1, 1), (1, 2), (2, 16)])
def test_equals_every_branch_for_every_token(case, level, shape):
    ffn = routed(case)
    if level is not None:
        force(ffn, level)
    x = inputs(*shape)
    (y, _), (expected, _) = ffn(x), dense(ffn, x)
    assert_close(y, expected, 1e-12)
    actual = gradients(y, x, ffn)
    for name, gradient in gradients(expected, x, ffn).items():
        assert_close(actual[name], gradient, 1e-10, name)


def test_every_level_is_reached_and_counted():
    ffn, x = routed(), inputs(8, 64)
    _, difficulty = dense(ffn, x)
    _, report = ffn(x)
    light, blend, full, rest_rows, n_tokens = report.metrics["routed"].tolist()
    assert n_tokens == 512
    assert light == (difficulty < 0.3).sum() > 10 and full == (difficulty > 0.7).sum() > 10
    assert blend == 512 - light - full > 10
    assert rest_rows % 16 == 0 and 0 <= rest_rows - (full + blend) < 16
    some = torch.arange(0, 512, 3)
    context = Context(torch.arange(64)[None], select=some)
    assert ffn(x, context)[1].metrics["routed"].tolist()[:3] == [
        int((difficulty.flatten()[some] < 0.3).sum()),
        int(((difficulty >= 0.3) & (difficulty <= 0.7)).flatten()[some].sum()),
        int((difficulty.flatten()[some] > 0.7).sum()),
    ]


def flops(ffn: RoutedFFN, x: torch.Tensor) -> tuple[int, int]:
    """Of a forward and of its backward pass, as torch counts what ran."""
    with FlopCounterMode(display=False) as forward:
        y, _ = ffn(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_compute_is_saved():
    x = inputs(4, 64)
    n, router = 256, 2 * 32 * 8 * 256
    light, full = 6 * 32 * 16 * n, 6 * 32 * 64 * n
    assert routed().light.down.in_features == 16  # a fifth of 64 is 12.8, to the nearest multiple of 8
    for level, expected in (("light", light), ("full", full), ("blend", full)):
        assert flops(force(routed(), level), x) == (router + expected, 2 * (router + expected))
    mixed = routed()
    forward, backward = flops(mixed, x)
    assert router + light < forward < router + full and backward == 2 * forward
    rest_rows = mixed(x)[1].metrics["routed"][3].item()
    assert forward == mixed.flops_of(n, rest_rows)


def test_a_token_does_not_show_how_many_others_share_its_level():
    """To the last bit: rows are computed in full tiles."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        ffn, x = routed().to(dtype), inputs(4, 64).detach().to(dtype)
        expected, _ = ffn(x)
        for n in (2, 5, 16, 33, 63):
            assert torch.equal(ffn(x[:, :n].contiguous())[0], expected[:, :n]), f"{dtype}, {n} tokens"


def _difficulty_gradient(ffn, x, loss_of):
    """Gradient of a loss of the output and the report by each token's difficulty."""
    seen = []
    difficulty = type(ffn).difficulty
    ffn.difficulty = lambda x_ND: seen.append(difficulty(ffn, x_ND)) or seen[-1]
    (gradient,) = torch.autograd.grad(loss_of(*ffn(x)), seen)
    del ffn.difficulty
    return gradient


def test_the_router_learns_through_the_blend_alone():
    ffn, x = routed(), inputs()
    _, difficulty = dense(ffn, x)
    gradient = _difficulty_gradient(ffn, x, lambda y, report: y.square().sum())
    blended = ((difficulty > 0.3) & (difficulty < 0.7)).flatten()
    assert (gradient[blended] != 0).all() and (gradient[~blended] == 0).all()


@pytest.mark.parametrize("level", ["light", "blend", "full"])
def test_the_budget_reaches_every_token_in_the_right_direction(level):
    """Compute above the budget pulls difficulty down, compute below it up, whatever the level."""
    for budget, sign in ((0.01, 1), (2.0, -1)):
        ffn, x = force(routed(), level), inputs()
        ffn.budget = budget
        gradient = _difficulty_gradient(ffn, x, lambda y, report: report.losses["routed_budget"].value)
        assert (sign * gradient > 0).all()


def test_the_budget_loss_is_that_of_the_levels_taken():
    ffn, x = routed(), inputs()
    _, report = ffn(x)
    light, blend, full = (report.metrics["routed"][:3] / 87).tolist()
    compute = 8 / (3 * 64) + 0.25 * light + blend + full
    loss = report.losses["routed_budget"]
    assert loss.value.item() == pytest.approx((compute - 0.6) ** 2, rel=1e-6) and loss.per == "batch"
    ffn.budget_weight = 3.0
    assert ffn(x)[1].losses["routed_budget"].value.item() == pytest.approx(3 * (compute - 0.6) ** 2, rel=1e-6)


def test_the_budget_is_for_training_and_counts_have_no_graph():
    ffn, x = routed(), inputs()
    report = ffn(x)[1]
    assert report.losses["routed_budget"].value.requires_grad and not report.metrics["routed"].requires_grad
    report = ffn.eval()(x)[1]
    assert not report.losses and report.metrics["routed"][4] == 87


@pytest.mark.parametrize("n_classes, low, high", [(2, 0.3, 0.7), (8, 0.3, 0.7), (8, 0.1, 0.4), (64, 0.3, 0.7)])
def test_difficulty_starts_spread_around_the_band(n_classes, low, high):
    """At equal logits entropy has no gradient; the start is so far from there that every level has tokens."""
    torch.manual_seed(0)
    case = f"{{type: routed, n_classes: {n_classes}, low: {low}, high: {high}}}"
    config = part_config(ATTENTION, case).model_copy(update={"dim": 128})
    ffn = build_model(config, vocab_size=61).blocks[0].ffn
    x = torch.randn(4, 256, 128)
    assert abs(ffn.difficulty(x.flatten(0, 1)).mean() - (low + high) / 2) < 0.25
    assert (ffn(x)[1].metrics["routed"][:3] > 5).all()


def test_autocast_routes_in_float32():
    torch.manual_seed(0)
    ffn = randomise_(part_model(ATTENTION, CASES[0])).blocks[0].ffn
    x = inputs(4, 64).detach().float()
    exact, exact_report = ffn(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, report = ffn(x)
        assert ffn.difficulty(x.flatten(0, 1)).dtype == torch.float32
    assert y.dtype == torch.bfloat16 and torch.equal(report.metrics["routed"], exact_report.metrics["routed"])
    assert_close(y.float(), exact, 2e-2)
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ffn.parameters())


def test_what_no_token_took_has_gradient_zero():
    ffn, x = force(routed(), "light"), inputs()
    ffn(x)[0].sum().backward()
    assert all((p.grad == 0).all() for p in ffn.rest.parameters())
    assert all((p.grad != 0).any() for p in ffn.light.parameters())


def test_account_is_at_the_budget():
    model = part_model(ATTENTION, "{type: routed, hidden: 64, budget: 0.5}")
    baseline = part_model(ATTENTION, "{type: swiglu, hidden: 64}")
    full, router = 2 * 3 * 32 * 64, 2 * 8 * 32  # of two layers
    count, plain = count_parameters(model), count_parameters(baseline)
    assert count.total == plain.total + router and count.active == plain.total - full // 2
    saved = training_flops_per_token(baseline, 8) - training_flops_per_token(model, 8)
    assert saved == 3 * 2 * full // 2


@pytest.mark.parametrize(
    "case, message",
    [("{low: 0.7, high: 0.3}", "low=0.7 is not below high=0.3"), ("{budget: 0.1}", "budget=0.1 is below light=0.2")],
)
def test_thresholds_and_budgets_that_cannot_be(case, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig.model_validate(yaml.safe_load(case))
