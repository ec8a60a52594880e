"""Routed experts with weights in few bits: the feed-forward of the values in float64, kernels, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from fusedlm.ops import dequantize_weight, quantize_weight, quantized_experts
from fusedlm.ops.quantized_moe import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.quantized_moe.triton")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
expert_slots = kernels.kernels.expert_slots
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [("mxfp4", None), ("int4", 32), ("int4", 64), ("int4", 128), ("fp8", None), ("int8", None)]
ALL = pytest.mark.parametrize(("format", "group"), FORMATS)


def _routing(n_tokens, n_experts, top_k, seed=0, last_is_idle=True):
    """Different experts of each token, never the last one if there are enough, and weights of either sign."""
    g = torch.Generator().manual_seed(seed)
    usable = n_experts - (last_is_idle and n_experts > top_k)
    indices = torch.rand(n_tokens, usable, generator=g).argsort(-1)[:, :top_k].contiguous()
    return indices.to(DEVICE), torch.randn(n_tokens, top_k, generator=g).to(DEVICE)


def _stacks(n_experts, dim, hidden, activation, formats, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = (2 if activation == "swiglu" else 1) * hidden
    up = dim**-0.5 * torch.randn(n_experts * rows, dim, generator=g)
    down = hidden**-0.5 * torch.randn(n_experts * dim, hidden, generator=g)
    return [quantize_weight(w.to(DEVICE), *how) for w, how in zip((up, down), formats, strict=True)]


def _definition(x, up, down, indices, weights, activation, slope):
    """One token and expert at a time, float64."""
    x, weights, dim = x.double(), weights.double(), x.shape[1]
    w_up, w_down = (dequantize_weight(w, torch.float64) for w in (up, down))
    w_down = w_down.view(-1, dim, down.width)
    w_up = w_up.view(len(w_down), -1, dim)
    y = []
    for t in range(len(x)):
        total = x.new_zeros(dim)
        for j, e in enumerate(indices[t].tolist()):
            h = w_up[e] @ x[t]
            if activation == "swiglu":
                a = F.silu(h[: down.width]) * h[down.width :]
            else:
                a = torch.where(h < 0, slope * h, h).square()
            total = total + weights[t, j] * (w_down[e] @ a)
        y.append(total)
    return torch.stack(y)


def _check(formats, n_tokens, dim, hidden, n_experts, top_k, activation, dtype, floor, configs=None, routing=None):
    up, down = _stacks(n_experts, dim, hidden, activation, formats)
    indices, weights = routing or _routing(n_tokens, n_experts, top_k)
    x = torch.randn(n_tokens, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    rest = (up, down, indices, weights, activation, 0.3)
    found = kernels.run(x, *rest, configs=configs)
    exact = _definition(x, *rest)
    same = reference.quantized_experts(x, *rest)
    assert found.dtype == dtype and found.shape == x.shape
    assert_close(found.double(), exact, max(2 * error_ratio(same.double(), exact), floor))


@ALL
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_the_reference_by_its_definition(format, group, activation):
    up, down = _stacks(4, 34, 21, activation, [(format, group)] * 2)
    indices, weights = _routing(5, 4, 2)
    x = torch.randn(5, 34, device=DEVICE, dtype=torch.float64, requires_grad=True)
    scores = weights.double().requires_grad_()
    y = quantized_experts(x, up, down, indices, scores, activation=activation, slope=0.3, backend="reference")
    exact = _definition(x, up, down, indices, scores, activation, 0.3)
    assert_close(y, exact, 1e-13)
    upstream = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(a, (x, scores), upstream) for a in (y, exact)), strict=True):
        assert_close(ours, theirs, 1e-12)


@ALL
@pytest.mark.parametrize(("dim", "hidden"), [(40, 33), (200, 70)])
def test_one_token(format, group, dim, hidden, poisoned):
    _check([(format, group)] * 2, 1, dim, hidden, 5, 2, "swiglu", torch.float32, 1e-6)


@ALL
@pytest.mark.parametrize(("n_tokens", "dim", "hidden"), [(2, 40, 33), (32, 200, 70)])
def test_several_tokens(format, group, n_tokens, dim, hidden, poisoned):
    _check([(format, group)] * 2, n_tokens, dim, hidden, 5, 2, "swiglu", torch.float32, 1e-6)


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 16, 32])
@pytest.mark.parametrize(("n_experts", "top_k"), [(3, 1), (9, 8), (6, 3), (2, 2), (70, 3)])
def test_numbers_of_experts(n_tokens, n_experts, top_k, poisoned):
    """Programs of experts and, with 70 of them, of slots; experts without tokens."""
    _check([("int8", None), ("mxfp4", None)], n_tokens, 40, 32, n_experts, top_k, "relu2", torch.float32, 1e-6)


@triton.jit
def _slots_kernel(indices, experts, slots, n_tokens, TOP_K: tl.constexpr, BY_SLOT: tl.constexpr):
    expert, slot = expert_slots(indices, n_tokens, TOP_K, 4, 16, BY_SLOT)
    program = tl.program_id(1)
    tl.store(experts + program, expert)
    tl.store(slots + program * 16 + tl.arange(0, 16), slot)


@pytest.mark.parametrize("by_slot", [False, True])
def test_one_program_has_all_tokens_of_an_expert(by_slot):
    """So that its codes are read once."""
    indices, _ = _routing(9, 6, 3)
    programs = 27 if by_slot else 6
    experts, slots = (torch.full((programs, *n), -7, device=DEVICE) for n in ((), (16,)))
    _slots_kernel[(1, programs)](indices, experts, slots, 9, TOP_K=3, BY_SLOT=by_slot)
    assert (slots >= -1).all()
    found = [(int(e), row[row >= 0].tolist()) for e, row in zip(experts, slots, strict=True) if (row >= 0).any()]
    flat = indices.flatten().tolist()
    assert sorted(found) == [(e, [i for i, f in enumerate(flat) if f == e]) for e in sorted(set(flat))]


@pytest.mark.parametrize("n_experts", [4, 200])
def test_one_expert_has_all_tokens(n_experts, poisoned):
    routing = torch.full((16, 1), 2, device=DEVICE), torch.randn(16, 1, device=DEVICE)
    formats = [("int4", None)] * 2
    _check(formats, 16, 64, 32, n_experts, 1, "swiglu", torch.float32, 1e-6, routing=routing)


@ALL
def test_one_token_in_several_tiles(format, group, poisoned):
    """Pieces of a row, of which the last is not full, and blocks of rows that are not full either."""
    config = {"ROWS": 4, "UNITS": 2}
    _check([(format, group)] * 2, 1, 170, 43, 3, 2, "swiglu", torch.float32, 1e-6, (config, config))


@ALL
def test_several_tokens_in_several_tiles(format, group, poisoned):
    config = {"ROWS": 16, "HALVES": 16, "TOKENS": 16}
    for dim, hidden in ((170, 43), (128, 64)):
        _check([(format, group)] * 2, 5, dim, hidden, 3, 2, "swiglu", torch.float32, 1e-6, (config, config))


@ALL
def test_one_token_in_bfloat16(format, group, poisoned):
    _check([(format, group)] * 2, 1, 200, 70, 4, 2, "swiglu", torch.bfloat16, 1e-6)


def test_results_are_the_same_bit_for_bit():
    up, down = _stacks(4, 40, 33, "swiglu", [("mxfp4", None)] * 2)
    for n_tokens in (1, 7):
        rest = (up, down, *_routing(n_tokens, 4, 3), "swiglu", 0.0)
        x = torch.randn(n_tokens, 40, device=DEVICE)
        first = kernels.run(x, *rest)
        assert all(torch.equal(kernels.run(x, *rest), first) for _ in range(3))


def test_more_tokens_and_gradients_decode_the_weights(monkeypatch):
    calls = []
    decoded = kernels.decoded
    monkeypatch.setattr(kernels, "decoded", lambda *a: calls.append(a) or decoded(*a))
    up, down = _stacks(4, 40, 32, "swiglu", [("int8", None)] * 2)
    for n_tokens, top_k in ((33, 1), (32, 4), (1, 2)):
        x = torch.randn(n_tokens, 40, device=DEVICE, requires_grad=n_tokens == 1)
        rest = (up, down, *_routing(n_tokens, 4, top_k), "swiglu", 0.0)
        y = kernels.quantized_experts(x, *rest)
        exact = _definition(x, *rest)
        assert_close(y.double(), exact, 1e-6)
        assert len(calls) == (0 if n_tokens == 32 else 2)
        calls.clear()
    ours, theirs = (torch.autograd.grad(a.sum(), x)[0] for a in (y, exact))
    assert_close(ours, theirs.float(), 1e-6)
    empty = kernels.quantized_experts(x.new_empty(0, 40), up, down, *_routing(0, 4, 2), "swiglu", 0.0)
    assert empty.shape == (0, 40)


@pytest.mark.parametrize(("n_tokens", "top_k", "few"), [(32, 8, True), (32, 9, False), (1, 32, True), (1, 33, False)])
def test_how_many_slots_the_kernels_take(n_tokens, top_k, few, monkeypatch):
    ran = []
    monkeypatch.setattr(kernels, "run", lambda x, *_: ran.append(x) or torch.zeros_like(x))
    up, down = _stacks(40, 16, 16, "relu2", [("fp8", None)] * 2)
    kernels.quantized_experts(
        torch.randn(n_tokens, 16, device=DEVICE), up, down, *_routing(n_tokens, 40, top_k), "relu2", 0.0
    )
    assert bool(ran) == few


def test_tiles_follow_the_number_of_tokens_and_the_length_of_rows():
    assert [kernels.one_token_config(n)["UNITS"] for n in (16, 320, 512, 4096)] == [1, 32, 32, 64]
    several = kernels.several_tokens_config
    assert [several(n, 512, torch.bfloat16)["TOKENS"] for n in (2, 16, 17, 32)] == [16, 16, 32, 32]
    assert [several(8, n, torch.bfloat16)["HALVES"] for n in (512, 640, 320, 336)] == [64, 64, 32, 64]
    assert several(2, 512, torch.float32)["TOKENS"] == 32


@pytest.mark.gpu
@ALL
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 16, 32])
@pytest.mark.parametrize(
    ("dim", "hidden", "n_experts", "top_k"), [(1024, 640, 32, 4), (330, 75, 9, 8), (96, 40, 99, 2)]
)
def test_kernels_on_a_gpu(format, group, activation, dtype, n_tokens, dim, hidden, n_experts, top_k, poisoned):
    floor = max(1e-6, 2**-24 * dim**0.5)
    _check([(format, group)] * 2, n_tokens, dim, hidden, n_experts, top_k, activation, dtype, floor)


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [1, 16])
def test_a_cuda_graph_follows_its_inputs(n_tokens):
    """Other tokens and experts than those with which it was captured."""
    up, down = _stacks(32, 256, 128, "swiglu", [("mxfp4", None)] * 2)
    x, (indices, weights) = torch.randn(n_tokens, 256, device=DEVICE).bfloat16(), _routing(n_tokens, 32, 4)
    call = lambda: quantized_experts(x, up, down, indices, weights, backend="triton")  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    other, factors = _routing(n_tokens, 32, 4, seed=1)
    x.normal_(), indices.copy_(other), weights.copy_(factors)
    graph.replay()
    assert torch.equal(out, call())


def _call(up=(8, 8), down=(8, 4), x=(3, 8), indices=None, weights=None, **options):
    """An op of one expert of 4 hidden elements, unless arguments say otherwise."""
    up, down = (quantize_weight(torch.ones(size), "int8") for size in (up, down))
    indices = torch.zeros(len(torch.empty(x)), 1, dtype=torch.int64) if indices is None else indices
    weights = torch.ones(indices.shape) if weights is None else weights
    return quantized_experts(torch.ones(x), up, down, indices, weights, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "gelu"}, "activation='gelu' is unknown; one of swiglu, relu2"),
        ({"up": (8, 7)}, r"up \(8, 7\) and down \(8, 4\) must be \(N, D\), \(E \* 2 H, D\) and \(E \* D, H\)"),
        ({"up": (4, 8)}, r"up \(4, 8\) and down \(8, 4\) must be"),
        ({"activation": "relu2"}, r"must be \(N, D\), \(E \* H, D\)"),
        ({"down": (9, 4)}, r"down \(9, 4\) must be"),
        ({"x": (3, 2, 8)}, r"x \(3, 2, 8\), up"),
        ({"indices": torch.zeros(2, 1).long()}, r"must be \(N, k\) with N=3"),
        ({"indices": torch.zeros(3, 2).long()}, "k from 1 to 1, the number of experts"),
        ({"indices": torch.zeros(3, 1).int()}, "must be int64 and of a float dtype"),
        ({"weights": torch.ones(3, 1).long()}, "must be int64 and of a float dtype"),
        ({"slope": math.inf}, "slope=inf must be finite"),
        ({"backend": "triton"}, "needs a CUDA device"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        _call(**options)


def test_the_operator_passes_opcheck():
    up, down = _stacks(4, 40, 32, "swiglu", [("int4", None)] * 2)
    stacks = (up.codes, up.scales, "int4", 64, down.codes, down.scales, 32, "int4", 64)
    arguments = (torch.randn(2, 40, device=DEVICE), *stacks, *_routing(2, 4, 2), "swiglu", 0.0)
    torch.library.opcheck(torch.ops.fusedlm.quantized_experts.default, arguments)
