"""The kernels of routed experts against the reference in float64: output and every gradient."""

from dataclasses import replace

import pytest
import torch

from fusedlm.ops import count_tokens, routed_experts
from fusedlm.ops.experts import reference
from fusedlm.ops.experts.order import sort_by_expert
from fusedlm.testing import RecordedOperators, assert_close, error_ratio
from tests.ops.test_experts import ACTIVATIONS, DEVICE, EMPTY, NAMES, SHAPES, choose, inputs, run

kernels = pytest.importorskip("fusedlm.ops.experts.triton")
order_kernels = pytest.importorskip("fusedlm.ops.experts.order_kernels")
products = pytest.importorskip("fusedlm.ops.experts.products")


def _check(function, tensors, indices, upstream, activation="swiglu", slope=0.0, floor=2e-6):
    """Within four times the error of the reference in the same precision, or within the floor."""
    options = (activation, slope)
    found = run(function, tensors, indices, upstream, *options)
    same = run(reference.routed_experts, tensors, indices, upstream, *options)
    exact = run(reference.routed_experts, tensors, indices, upstream, *options, dtype=torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=True):
        assert a.dtype == s.dtype, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, activation, slope, poisoned):
    _check(kernels.routed_experts, *inputs(shape, activation), activation, slope)


@pytest.mark.parametrize("shape", EMPTY)
def test_kernel_on_empty_tensors(shape, poisoned):
    tensors, indices, upstream = inputs(shape)
    expected = run(reference.routed_experts, tensors, indices, upstream, "swiglu", 0.0)
    for a, e in zip(run(kernels.routed_experts, tensors, indices, upstream, "swiglu", 0.0), expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and not a.any()


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("n_subtiles", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(110, 40, 72, 4, 2, "skewed"), (50, 37, 41, 4, 2, "even")])
def test_kernel_in_many_small_tiles(shape, n_subtiles, activation, poisoned, monkeypatch):
    """Several tiles per program and expert, several groups of tiles, several steps of the inner loop."""
    sizes = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "SUBTILES": n_subtiles}
    small = replace(products._FLOAT32, **sizes, FLATTEN=True)
    monkeypatch.setattr(products, "_FLOAT32", small)
    _check(kernels.routed_experts, *inputs(shape, activation), activation, 0.25)


def test_kernels_of_a_call_have_the_same_row_tiles():
    """They share a schedule, which has room for tiles of that many rows."""
    row_tiles = {t.BLOCK_M for name, t in products._TILES.items() if not name.endswith("gradient")}
    assert row_tiles == {products._POINTERS.BLOCK_M}
    for tiles in (products._POINTERS, products._FEW_ROWS, products._FLOAT32):
        assert tiles.BLOCK_M >= order_kernels._LEAST_BLOCK_M


@pytest.mark.parametrize("width", [24, 37, 1500])
def test_rows_of_slots(width, poisoned):
    """Each row of x in the place of every slot of its token."""
    (x, *_), indices, _ = inputs((33, width, 40, 5, 2, "skewed"))
    schedule = order_kernels.schedule_tiles(indices, 5, 32)
    found = products.spread(x, schedule, 2)
    assert torch.equal(found, x[schedule.slots.long() // 2])


def test_tma_is_used_where_rows_are_aligned(monkeypatch):
    used, can_use_tma = [], products.can_use_tma
    monkeypatch.setattr(products, "can_use_tma", lambda *x: used.append(can_use_tma(*x)) or used[-1])
    for dim, hidden, expected in ((24, 40, True), (23, 41, False)):
        used.clear()
        tensors, indices, upstream = inputs((33, dim, hidden, 5, 2, "even"))
        run(kernels.routed_experts, tensors, indices, upstream, "swiglu", 0.0)
        has_tma = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
        assert used == [expected and has_tma] * 6


def test_kernel_on_views():
    """Slices, transposed matrices, expanded weights and upstream gradients, indices in another order."""
    tensors, indices, upstream = inputs((33, 24, 40, 5, 2, "even"))
    tensors[3] = tensors[3][:, :1].expand(33, 2)

    def function(x, w_up, w_down, indices, weights, *options):
        x = torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, :24]
        w_up = w_up.transpose(1, 2).contiguous().transpose(1, 2)
        return kernels.routed_experts(x, w_up, w_down, indices.t().contiguous().t(), weights, *options)

    _check(function, tensors, indices, upstream[:1].expand(33, 24))


def test_nan_stays_in_its_token():
    (x, w_up, w_down, weights), indices, _ = inputs((33, 24, 40, 5, 2, "even"))
    x[7, 3] = float("nan")
    out = kernels.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)
    assert out[7].isnan().all() and out[torch.arange(33) != 7].isfinite().all()


def test_what_is_saved_for_backward():
    """x, the parameters, the weights, h, and integers: neither gathered rows nor the activation."""
    (x, w_up, w_down, weights), indices, _ = inputs((33, 24, 40, 5, 2, "even"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: saved.append(a) or a, lambda a: a):
        kernels.routed_experts(*(a.requires_grad_() for a in (x, w_up, w_down)), indices, weights, "swiglu", 0.0)
    floats = [tuple(a.shape) for a in saved if a.is_floating_point()]
    assert sorted(floats) == sorted([(33, 24), (5, 80, 24), (5, 24, 40), (33, 2), (66, 80)])
    assert {a.dtype for a in saved if not a.is_floating_point()} == {torch.int32}
    assert sum(a.numel() for a in saved if not a.is_floating_point()) < 3 * 66 + 3 * 5 + 3


def test_backward_allocates_no_zeros():
    """As autograd does for the gradients of further outputs, unless told otherwise."""
    tensors, indices, upstream = inputs(SHAPES[0])
    x, w_up, w_down, weights = leaves = [a.requires_grad_() for a in tensors]
    out = kernels.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)
    with RecordedOperators() as ran:
        torch.autograd.grad(out, leaves, upstream)
    assert ran.names and not any("zeros" in name for name in ran.names)


def test_backward_twice():
    tensors, indices, upstream = inputs(SHAPES[0])
    x, w_up, w_down, weights = leaves = [a.requires_grad_() for a in tensors]
    out = kernels.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, leaves, upstream), first, strict=True))


@pytest.mark.parametrize(("chunk", "tile"), [(order_kernels._CHUNK, order_kernels._TILE), (16, 64), (64, 128)])
@pytest.mark.parametrize("shape", [(300, 5, 2, "skewed"), (41, 4, 3, "even"), (7, 1, 1, "even"), (19, 6, 1, "one")])
def test_order_of_slots(shape, chunk, tile, poisoned, monkeypatch):
    """As torch sorts them, in one chunk and in many, in one step and in several. Every row tile has its expert."""
    monkeypatch.setattr(order_kernels, "_CHUNK", chunk)
    monkeypatch.setattr(order_kernels, "_TILE", tile)
    n, n_experts, k, choice = shape
    indices = choose(n, n_experts, k, choice).to(DEVICE)
    schedule = order_kernels.schedule_tiles(indices, n_experts, 32)
    for found, expected in zip(schedule.order, sort_by_expert(indices, n_experts), strict=True):
        assert torch.equal(found, expected)
    counts = count_tokens(indices, n_experts).tolist()
    heights = [-(-count // 32) for count in counts]
    assert schedule.starts.tolist() == [sum(counts[:e]) for e in range(n_experts + 1)]
    assert schedule.tile_starts.tolist() == [sum(heights[:e]) for e in range(n_experts + 1)]
    experts = [e for e in range(n_experts) for _ in range(heights[e])]
    rest = [n_experts - 1] * (len(schedule.tile_experts) - len(experts))
    assert schedule.tile_experts.tolist() == experts + rest


@pytest.mark.gpu
def test_order_of_many_slots():
    indices = choose(20000, 96, 8, "skewed").cuda()
    schedule = order_kernels.schedule_tiles(indices, 96, 128)
    assert all(torch.equal(a, b) for a, b in zip(schedule.order, sort_by_expert(indices, 96), strict=True))


def test_operators_pass_opcheck():
    tensors, indices, upstream = inputs((9, 8, 12, 4, 2, "even"))
    options = ("swiglu", 0.0)
    x, w_up, w_down, weights = detached = [a.detach() for a in tensors]
    operators = torch.ops.fusedlm
    torch.library.opcheck(operators.routed_experts_inference.default, (x, w_up, w_down, indices, weights, *options))
    _, h, *schedule = operators.routed_experts(x, w_up, w_down, indices, weights, *options)
    torch.library.opcheck(operators.routed_experts_backward.default, (upstream, *detached, h, schedule, *options))
    x, w_up, w_down, weights = [a.requires_grad_() for a in tensors]
    torch.library.opcheck(operators.routed_experts.default, (x, w_up, w_down, indices, weights, *options))


def test_full_graph():
    tensors, indices, upstream = inputs((9, 8, 12, 4, 2, "even"))

    def function(x, *rest):
        return kernels.routed_experts(2 * x, *rest)

    plain = run(function, tensors, indices, upstream, "swiglu", 0.0)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = run(compiled, tensors, indices, upstream, "swiglu", 0.0)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


LARGE = [
    (2000, 256, 512, 8, 2, "even"),
    (2000, 256, 512, 8, 2, "skewed"),
    (1500, 520, 328, 16, 4, "skewed"),
    (700, 136, 72, 6, 1, "one"),
    (700, 136, 72, 9, 3, "same"),
    (129, 31, 77, 5, 2, "even"),
    (100, 256, 512, 32, 2, "skewed"),
    (1, 64, 256, 4, 2, "even"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
@pytest.mark.parametrize("shape", LARGE)
def test_kernel_in_bfloat16(shape, activation, slope, poisoned):
    _check(kernels.routed_experts, *inputs(shape, activation, torch.bfloat16), activation, slope, 1e-5)


@pytest.mark.gpu
def test_kernel_in_float16(poisoned):
    _check(kernels.routed_experts, *inputs(LARGE[1], "swiglu", torch.float16), floor=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("shape", LARGE)
def test_products_of_both_kinds(shape, library, poisoned, monkeypatch):
    """F.grouped_mm and the kernels."""
    names = ("down", "up_backward", "down_gradient", "up_gradient")
    monkeypatch.setattr(products, "_LIBRARY", frozenset(names if library else ()))
    _check(kernels.routed_experts, *inputs(shape, "swiglu", torch.bfloat16), floor=1e-5)


@pytest.mark.gpu
def test_weights_in_float32():
    """As under autocast: cast for the matrix products, with float32 gradients."""
    tensors, indices, upstream = inputs(LARGE[1], "swiglu", torch.bfloat16, torch.float32)
    found = run(kernels.routed_experts, tensors, indices, upstream, "swiglu", 0.0)
    assert [a.dtype for a in found] == [torch.bfloat16] * 2 + [torch.float32] * 3
    assert not torch.equal(found[2], found[2].bfloat16().float())
    _check(kernels.routed_experts, tensors, indices, upstream, floor=1e-5)


@pytest.mark.gpu
def test_the_host_does_not_wait():
    """Neither forward nor backward, in a CUDA graph that then takes other experts."""
    tensors, indices, upstream = inputs(LARGE[1], "swiglu", torch.bfloat16)
    x, w_up, w_down, weights = leaves = [a.requires_grad_() for a in tensors]
    others = choose(*LARGE[1][:1], *LARGE[1][3:5], "even").to(DEVICE)

    def step():
        out = routed_experts(x, w_up, w_down, indices, weights)
        return [out, count_tokens(indices, len(w_up)), *torch.autograd.grad(out, leaves, upstream)]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for chosen in (others, indices.clone()):
        indices.copy_(chosen)
        graph.replay()
        expected = step()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """Of the hidden layer."""
    n, dim, hidden, n_experts, k = 2**31 // 16384 + 130, 64, 4096, 4, 2
    x, w_up, w_down = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16) / 8
        for size in ((n, dim), (n_experts, 2 * hidden, dim), (n_experts, dim, hidden))
    )
    indices, weights = choose(n, n_experts, k, "even").cuda(), torch.rand(n, k, device="cuda")
    leaves = [a.requires_grad_() for a in (x, w_up, w_down)]
    upstream = torch.randn_like(x)
    out = kernels.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)
    dx = torch.autograd.grad(out, leaves, upstream)[0]
    tail = x[-100:].detach().requires_grad_()
    expected = reference.routed_experts(tail, w_up, w_down, indices[-100:], weights[-100:], "swiglu", 0.0)
    assert_close(out[-100:], expected, 1e-2)
    assert_close(dx[-100:], torch.autograd.grad(expected, tail, upstream[-100:])[0], 1e-2)
