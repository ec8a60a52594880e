"""Routed experts: the reference against the formula in float64, output and every gradient; the order of slots."""

import pytest
import torch

from fusedlm.ops import count_tokens, routed_experts
from fusedlm.ops.experts import reference
from fusedlm.ops.experts.order import sort_by_expert
from fusedlm.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "x", "w_up", "w_down", "weights")
ACTIVATIONS = [("swiglu", 0.0), ("relu2", 0.0), ("relu2", 0.5)]
# N, D, H, E, k, and how tokens choose experts.
SHAPES = [
    (33, 24, 40, 5, 2, "even"),
    (40, 31, 21, 4, 3, "skewed"),
    (17, 8, 16, 6, 1, "one"),
    (17, 20, 12, 6, 3, "same"),
    (1, 16, 8, 4, 2, "even"),
    (9, 4, 1, 3, 3, "even"),
    (5, 1, 7, 1, 1, "even"),
]
EMPTY = [(0, 4, 8, 3, 2, "even"), (3, 0, 8, 2, 1, "even"), (3, 4, 0, 2, 1, "even")]


def choose(n, n_experts, k, choice, seed=0) -> torch.Tensor:
    """(n, k). even: at random; skewed: some experts often and some never; one: all tokens the last; same: all the
    first k."""
    if choice == "one":
        return torch.full((n, k), n_experts - 1)
    if choice == "same":
        return torch.arange(k).repeat(n, 1)
    scores = torch.rand(n, n_experts, generator=torch.Generator().manual_seed(seed))
    if choice == "skewed":
        scores += 3 * torch.arange(n_experts) / n_experts
    return scores.topk(k).indices


def inputs(shape, activation="swiglu", dtype=torch.float32, weight_dtype=None):
    n, d, h, n_experts, k, choice = shape
    g = torch.Generator().manual_seed(n + d + h)

    def draw(*size, scale=1.0, dtype=dtype):
        return (scale * torch.randn(size, generator=g)).to(DEVICE, dtype)

    rows = 2 * h if activation == "swiglu" else h
    x, upstream = draw(n, d), draw(n, d)
    w_up = draw(n_experts, rows, d, scale=max(d, 1) ** -0.5, dtype=weight_dtype or dtype)
    w_down = draw(n_experts, d, h, scale=max(h, 1) ** -0.5, dtype=weight_dtype or dtype)
    weights = torch.rand(n, k, generator=g).to(DEVICE, torch.promote_types(dtype, torch.float32))
    return [x, w_up, w_down, weights], choose(n, n_experts, k, choice).to(DEVICE), upstream


def run(function, tensors, indices, upstream, *options, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    x, w_up, w_down, weights = leaves
    out = function(x, w_up, w_down, indices, weights, *options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _dense(x, w_up, w_down, indices, weights, activation, slope):
    """Every expert on every token; the weight of an expert that a token has not chosen is 0."""
    y = torch.zeros_like(x)
    for e in range(len(w_up)):
        h = x @ w_up[e].t()
        if activation == "swiglu":
            gate, up = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
            a = gate / (1 + (-gate).exp()) * up
        else:
            a = torch.where(h > 0, h, slope * h) ** 2
        y = y + (weights * (indices == e)).sum(1, keepdim=True) * (a @ w_down[e].t())
    return y


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(shape, activation, slope):
    """The output and every gradient."""
    tensors, indices, upstream = inputs(shape, activation, torch.float64)
    found = run(reference.routed_experts, tensors, indices, upstream, activation, slope)
    expected = run(_dense, tensors, indices, upstream, activation, slope)
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert a.dtype == torch.float64 and a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
def test_gradients_of_the_reference(activation, slope):
    tensors, indices, _ = inputs((4, 3, 5, 4, 2, "even"), activation, torch.float64)

    def function(x, w_up, w_down, weights):
        return reference.routed_experts(x, w_up, w_down, indices, weights, activation, slope)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("shape", EMPTY)
def test_reference_on_empty_tensors(shape):
    tensors, indices, upstream = inputs(shape)
    found = run(reference.routed_experts, tensors, indices, upstream, "swiglu", 0.0)
    for a, e in zip(found, [tensors[0], *tensors], strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and not a.any()


def test_gradients_have_the_dtypes_of_the_inputs():
    tensors, indices, upstream = inputs((33, 24, 40, 5, 2, "even"), dtype=torch.bfloat16, weight_dtype=torch.float32)
    found = run(reference.routed_experts, tensors, indices, upstream, "swiglu", 0.0)
    assert [a.dtype for a in found] == [torch.bfloat16] * 2 + [torch.float32] * 3
    exact = run(reference.routed_experts, tensors, indices, upstream, "swiglu", 0.0, dtype=torch.float64)
    for name, a, e in zip(NAMES, found, exact, strict=True):
        assert_close(a, e, 1e-2, name)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], EMPTY[0]])
def test_order_of_slots(shape):
    _, indices, _ = inputs(shape)
    order = sort_by_expert(indices, shape[3])
    experts = indices.flatten()
    by_hand = sorted(range(experts.numel()), key=lambda slot: experts[slot].item())  # stable
    assert order.slots.tolist() == by_hand
    assert order.rows.tolist() == [by_hand.index(slot) for slot in range(experts.numel())]
    counts = [(experts == e).sum().item() for e in range(shape[3])]
    assert order.ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert count_tokens(indices, shape[3]).tolist() == counts


def test_full_graph_of_the_reference():
    """Its loop is an operator there, which serves other sizes of groups too."""
    tensors, indices, upstream = inputs(SHAPES[0])
    traced = []

    def function(x, w_up, w_down, indices, weights):
        return routed_experts(2 * x, w_up, w_down, indices, weights, backend="reference")

    def backend(graph, example_inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for chosen in (indices, choose(33, 5, 2, "skewed")):
        plain = run(function, tensors, chosen, upstream)
        for a, b in zip(run(compiled, tensors, chosen, upstream), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert traced.count("fusedlm.experts_grouped_linear.default") == 2


def test_operators_of_the_reference_pass_opcheck():
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((7, 4), (3, 5, 4)))
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)
    operators = torch.ops.fusedlm
    torch.library.opcheck(operators.experts_grouped_linear.default, (x.requires_grad_(), weight.requires_grad_(), ends))
    dy = torch.randn(7, 5, generator=g, dtype=torch.float64)
    torch.library.opcheck(operators.experts_grouped_linear_backward.default, (dy, x.detach(), weight.detach(), ends))
    expected = torch.autograd.grad(reference.grouped_linear(x, weight, ends), (x, weight), dy)
    found = torch.autograd.grad(operators.experts_grouped_linear(x, weight, ends), (x, weight), dy)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_bad_input():
    (x, w_up, w_down, weights), indices, _ = inputs((5, 8, 12, 3, 2, "even"))
    with pytest.raises(ValueError, match=r"^x \(5, 7\), w_up \(3, 24, 8\) and w_down \(3, 8, 12\) must be"):
        routed_experts(x[:, :7], w_up, w_down, indices, weights)
    with pytest.raises(ValueError, match=r"must be \(N, D\), \(E, H, D\) and \(E, D, H\)"):
        routed_experts(x, w_up, w_down, indices, weights, activation="relu2")
    with pytest.raises(ValueError, match=r"w_down \(8, 12\) must be"):
        routed_experts(x, w_up, w_down[0], indices, weights)
    with pytest.raises(ValueError, match=r"indices \(4, 2\) torch.int64, weights \(5, 2\) torch.float32 must be \(N,"):
        routed_experts(x, w_up, w_down, indices[1:], weights)
    with pytest.raises(ValueError, match="must be .* with k from 1 to 3, the number of experts"):
        routed_experts(x, w_up, w_down, indices.repeat(1, 2), weights.repeat(1, 2))
    with pytest.raises(ValueError, match=r"indices \(5, 2\) torch.int32, .* must be int64"):
        routed_experts(x, w_up, w_down, indices.int(), weights)
    with pytest.raises(ValueError, match="activation='gelu' is unknown; one of swiglu, relu2"):
        routed_experts(x, w_up, w_down, indices, weights, activation="gelu")
    with pytest.raises(ValueError, match="slope=inf must be finite"):
        routed_experts(x, w_up[:, :12], w_down, indices, weights, activation="relu2", slope=float("inf"))
