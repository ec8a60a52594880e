"""The reference against the formula, the kernels and torch's attention against the reference in float64."""

import pytest
import torch

from fusedlm.ops import latent_decode, quantise_latent
from fusedlm.ops.latent import reference, sdpa
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.latent.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
TILE = {"stages": 2, "warps": 4, "per_processor": 1}
TMA, POINTERS = kernels.Config(16, tma=True, **TILE), kernels.Config(16, tma=False, **TILE)
PROGRAMS = [0, 1, 2, 5]  # 0: one for each row of the batch
LENGTHS = [0, 1, 16, 17, 50]  # of the rows of a batch, the new tokens included


def _draw(*size, dtype=torch.float32, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size) + seed)).to(DEVICE, dtype)


def _inputs(batch=3, n_new=1, heads=4, n_keys=40, rank=16, rope=8, lengths=None, dtype=torch.float32):
    """q, state, rank, scale, starts; NaN beyond each length."""
    q = _draw(batch, n_new, heads, rank + rope, dtype=dtype)
    state = _draw(batch, n_keys, rank + rope, dtype=dtype)
    starts = None
    if lengths is not None:
        starts = torch.tensor(lengths, device=DEVICE) - n_new
        for b, length in enumerate(lengths):
            state[b, length:] = float("nan")
    return q, state, rank, SCALE, starts


def _paged(state, page_size, seed=1):
    """The state in pages in a random order, between pages of NaN, and the table; NaN where the state has no tokens."""
    batch, n_keys, width = state.shape
    n_pages = -(-n_keys // page_size)
    padded = torch.full((batch, n_pages * page_size, width), float("nan"), device=DEVICE, dtype=state.dtype)
    padded[:, :n_keys] = state
    order = torch.randperm(2 * batch * n_pages, generator=torch.Generator().manual_seed(seed))[: batch * n_pages]
    pages = torch.full((2 * batch * n_pages, page_size, width), float("nan"), device=DEVICE, dtype=state.dtype)
    pages[order.to(DEVICE)] = padded.view(-1, page_size, width)
    return pages, order.view(batch, n_pages).to(DEVICE, torch.int32)


def _arguments(
    q, state, rank, scale, starts=None, visible=None, table=None, tokens=None, rope=None, signal=None, w=None
):
    return q, state, rank, scale, starts, visible, table, tokens, rope, signal or q.shape[2], w


def _exact(arguments):
    """By the reference in float64; a float8 state as it is."""
    is_wide = [isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != reference.FP8 for x in arguments]
    return reference.latent_decode(*(x.double() if wide else x for x, wide in zip(arguments, is_wide, strict=True)))


def _check(arguments, config=TMA, programs=2, floor=1e-6):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found, exact = kernels.run(*arguments, config=config, programs=programs), _exact(arguments)
    same = reference.latent_decode(*arguments)
    assert found.dtype == same.dtype
    assert_close(found, exact, max(4 * error_ratio(same, exact), floor))
    return found


def test_is_the_formula():
    q, state, rank, _, _ = _inputs(n_new=2)
    out = latent_decode(q, state, rank=rank, scale=SCALE, backend="reference")
    scores = SCALE * (state[1, :39] @ q[1, 0, 3])  # the last key is that of the second new token
    assert_close(out[1, 0, 3], scores.softmax(0) @ state[1, :39, :rank], 1e-6)
    weights = _draw(2)
    found = latent_decode(q, state, rank=rank, scale=SCALE, n_signal=2, noise_weight=weights, backend="reference")
    assert_close(found[1, 0, 1], out[1, 0, 1] - weights[1] * out[1, 0, 3], 1e-6)
    found = latent_decode(q, state, rank=rank, scale=SCALE, n_signal=3, noise_weight=_draw(3), backend="reference")
    assert_close(found[1, 0, 1], out[1, 0, 1] - _draw(3)[1] * out[1, 0, 3], 1e-6)


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("noise", [None, 2, 3])
def test_gradients_of_the_reference(n_new, noise):
    q, state, rank, scale, starts = _inputs(batch=2, n_new=n_new, n_keys=6, rank=3, rope=2, dtype=torch.float64)
    weight = None if noise is None else _draw(noise, dtype=torch.float64).requires_grad_()

    def function(q, state, *weight):
        return reference.latent_decode(
            *_arguments(q, state, rank, scale, signal=noise, w=weight[0] if weight else None)
        )

    leaves = [q.requires_grad_(), state.requires_grad_(), *([] if weight is None else [weight])]
    assert torch.autograd.gradcheck(function, leaves)
    for a, b in zip(
        _gradients(sdpa.latent_decode, leaves, noise), _gradients(reference.latent_decode, leaves, noise), strict=True
    ):
        assert_close(a, b, 1e-10)


def _gradients(function, leaves, noise):
    q, state, *weight = leaves
    out = function(*_arguments(q, state, 3, SCALE, signal=noise, w=weight[0] if weight else None))
    return torch.autograd.grad((out * _draw(*out.shape, dtype=torch.float64)).sum(), leaves)


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("n_new", [1, 2, 8, 35])
def test_kernel(n_new, config, programs, poisoned):
    _check(_arguments(*_inputs(n_new=n_new)), config, programs)


@pytest.mark.parametrize("programs", [0, 1, 2, 11])
@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("n_new", [1, 4])
def test_rows_of_different_lengths(n_new, config, programs, poisoned):
    """Shorter ones than the new tokens too: queries without keys give zeros. NaN beyond each length."""
    found = _check(_arguments(*_inputs(batch=5, n_new=n_new, n_keys=50, lengths=LENGTHS)), config, programs)
    assert not found[0].any() and not found[1, : n_new - 1].any() and found[1, n_new - 1].all()


@pytest.mark.parametrize("programs", [0, 3])
def test_a_batch_without_any_tokens(programs, poisoned):
    arguments = _arguments(*_inputs(n_new=2, lengths=[0, 0, 0]))
    for config in (TMA, POINTERS):
        assert not kernels.run(*arguments, config=config, programs=programs).any()


@pytest.mark.parametrize("programs", [0, 7])
@pytest.mark.parametrize("heads", [1, 3, 17, 40])
def test_heads_that_do_not_fill_a_tile(heads, programs, monkeypatch, poisoned):
    """17 and 40 heads of 3 tokens are several tiles of 32."""
    monkeypatch.setattr(kernels, "_ACCUMULATOR", {2: 512, 4: 512})
    _check(_arguments(*_inputs(batch=2, n_new=3, heads=heads, n_keys=24, lengths=[24, 3])), TMA, programs)


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("rank, rope", [(1, 1), (12, 4), (20, 0), (33, 6), (64, 16), (24, 40)])
def test_widths(rank, rope, config, poisoned):
    _check(_arguments(*_inputs(rank=rank, rope=rope, n_new=2, lengths=[40, 2, 21])), config)


@pytest.mark.parametrize("programs", [0, 1, 4])
@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_documents(shared, config, programs, poisoned):
    """Tokens that see only some of those before them; rows of one length may share the numbers."""
    lengths = None if shared else [40, 3, 30]
    inputs = _inputs(n_new=3, lengths=lengths)
    visible = torch.tensor([[20, 0, 1]] if shared else [[37, 0, 1], [0, 1, 2], [3, 4, 5]], device=DEVICE)
    _check(_arguments(*inputs, visible), config, programs)


@pytest.mark.parametrize("programs", [0, 3])
@pytest.mark.parametrize("signal, heads", [(3, 6), (3, 4), (1, 2)])
@pytest.mark.parametrize("weight", ["one", "head", "token"])
def test_noise(weight, signal, heads, programs, poisoned):
    inputs = _inputs(n_new=2, heads=heads, lengths=[40, 1, 21])
    w = {"one": _draw(), "head": _draw(signal), "token": _draw(3, 2, signal)}[weight]
    _check(_arguments(*inputs, signal=signal, w=w), TMA, programs)


@pytest.mark.parametrize("programs", [0, 5])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("block", [16, 32])
def test_pages(block, page_size, programs, poisoned):
    q, state, rank, scale, starts = _inputs(batch=5, n_new=3, n_keys=80, lengths=[0, 3, 32, 33, 80])
    pages, table = _paged(state, page_size)
    for row, length in enumerate([0, 3, 32, 33, 80]):
        table[row, -(-length // page_size) :] = -(2**30)  # never read
    found = _check(_arguments(q, pages, rank, scale, starts, table=table), kernels.Config(block, **TILE), programs)
    assert_close(found, kernels.run(*_arguments(q, state, rank, scale, starts), config=TMA, programs=1), 1e-6)


@pytest.mark.parametrize("programs", [0, 1, 5])
@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
def test_float8_state(config, programs, poisoned):
    """Exact for the rounded latents, with scales from 1e-6 to 1e3, NaN beyond each length, and a token of zeros."""
    q, state, rank, scale, starts = _inputs(batch=5, n_new=2, n_keys=50, lengths=LENGTHS)
    state[:, :, :rank] *= 10 ** _draw(5, 50, 1).clamp(-6, 3)
    state[4, 3, :rank] = 0
    latent, tokens = quantise_latent(state[..., :rank])
    rope = state[..., rank:].contiguous()
    q[..., :rank] /= state[4, :, :rank].abs().max()
    _check(_arguments(q, latent, rank, scale, starts, tokens=tokens, rope=rope), config, programs)
    if not config.tma:
        (pages, table), (more, _), (factors, _) = (_paged(x, 16) for x in (latent.float(), rope, tokens[..., None]))
        pages, factors = pages.to(reference.FP8), factors[..., 0].contiguous()
        _check(_arguments(q, pages, rank, scale, starts, None, table, factors, more), config, programs)


def test_quantising():
    latent = _draw(3, 5, 64)
    rounded, scale = quantise_latent(latent)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (3, 5) and scale.dtype == torch.float32
    back = rounded.float() * scale[..., None]
    assert (
        (back - latent).abs() <= torch.maximum(latent.abs() / 16, latent.abs().amax(-1, keepdim=True) / 2**15)
    ).all()
    assert torch.equal(rounded.float().abs().amax(-1), torch.full((3, 5), 448.0, device=DEVICE))
    zeros, scale = quantise_latent(torch.zeros(2, 8, device=DEVICE))
    assert not zeros.float().any() and (scale > 0).all()


@pytest.mark.parametrize("case", ["aligned", "ragged", "documents", "pages", "float8", "noise"])
@pytest.mark.parametrize("n_new", [1, 3, 12])
def test_torch_attention(n_new, case):
    lengths = None if case in ("aligned", "noise") else [40, n_new, 0]
    q, state, rank, scale, starts = _inputs(n_new=n_new, lengths=lengths)
    arguments = _arguments(q, state, rank, scale, starts)
    if case == "documents":
        visible = torch.arange(n_new, device=DEVICE).expand(3, -1)
        arguments = _arguments(q, state, rank, scale, starts, visible)
    elif case == "pages":
        pages, table = _paged(state, 16)
        arguments = _arguments(q, pages, rank, scale, starts, table=table)
    elif case == "float8":
        latent, tokens = quantise_latent(state[..., :rank])
        arguments = _arguments(q, latent, rank, scale, starts, tokens=tokens, rope=state[..., rank:])
    elif case == "noise":
        arguments = _arguments(q, state, rank, scale, signal=2, w=_draw(2))
    assert_close(sdpa.latent_decode(*arguments), _exact(arguments), 1e-6)


def test_a_state_with_room_and_queries_that_are_slices():
    q, state, rank, scale, starts = _inputs(n_new=2, lengths=[40, 2, 21])
    room = torch.full((3, 90, 24), float("nan"), device=DEVICE)
    room[:, :40] = state
    wide = torch.full((3, 2, 6, 40), float("nan"), device=DEVICE)
    wide[:, :, 1:5, 8:32] = q
    for config in (TMA, POINTERS):
        _check(_arguments(wide[:, :, 1:5, 8:32], room[:, :40], rank, scale, starts), config)
        transposed = q.transpose(0, 1).contiguous().transpose(0, 1)
        _check(_arguments(transposed, room.transpose(1, 2).contiguous().transpose(1, 2), rank, scale, starts), config)


def test_keys_that_dominate_and_are_far():
    """Scores of some hundreds: no overflow, and rows of very different sums in different pieces."""
    q, state, rank, scale, starts = _inputs(n_keys=64)
    state[:, :16] *= 30
    state[:, 48:] *= 1e-3
    for programs in (0, 4):
        _check(_arguments(q, state, rank, scale), POINTERS, programs)


@pytest.mark.parametrize("programs", [0, 2])
def test_empty(programs):
    for size in ({"batch": 0}, {"heads": 0}):
        arguments = _arguments(*_inputs(**size))
        assert kernels.run(*arguments, config=TMA, programs=programs).shape == _exact(arguments).shape


def test_programs_follow_sizes_alone(monkeypatch):
    monkeypatch.setattr("fusedlm.ops.common.split_keys.n_multiprocessors", lambda device: 132)
    config = kernels.Config(64, per_processor=2, stages=2, warps=4)
    programs = [kernels.n_programs(batch, n, blocks, config, DEVICE) for batch, n, blocks in
                [(1, 64, 1), (1, 65, 1), (1, 10**5, 1), (64, 4096, 1), (64, 4096, 3), (1056, 4096, 1)]]  # fmt: skip
    assert programs == [0, 2, 264, 264, 88, 0]


@pytest.mark.parametrize("case, noise", [("aligned", None), ("pages", 2), ("float8", None)])
def test_operator_passes_opcheck(case, noise):
    lengths = None if case == "aligned" else [20, 0]
    q, state, rank, scale, starts = _inputs(batch=2, n_new=2, n_keys=20, lengths=lengths)
    rest = {"signal": noise, "w": None if noise is None else _draw(noise)}
    if case == "pages":
        state, rest["table"] = _paged(state, 16)
    if case == "float8":
        rest["rope"] = state[..., rank:].contiguous()
        state, rest["tokens"] = quantise_latent(state[..., :rank])
    # test_schema compares inputs before and after, which torch cannot for float8.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    operator = torch.ops.fusedlm.latent_decode.default
    arguments = _arguments(q, state, rank, scale, starts, **rest)
    torch.library.opcheck(operator, arguments, test_utils=tests[case == "float8" :])


def test_full_graph():
    q, state, rank, scale, starts = _inputs(n_new=2, lengths=[40, 2, 0])

    def function(q, state, starts):
        return kernels.latent_decode(*_arguments(2 * q, state, rank, scale, starts))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, state, starts), function(q, state, starts))

    def public(q, state, starts):
        return latent_decode(q, state, rank=rank, scale=scale, starts_B=starts)

    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, state, starts), public(q, state, starts), 1e-6)


@pytest.mark.parametrize("n_new, requires_grad", [(256, False), (257, False), (1, True)])
def test_more_tokens_and_gradients_run_torch_attention(n_new, requires_grad, monkeypatch):
    arguments = _arguments(*_inputs(n_new=n_new, n_keys=260))
    arguments[0].requires_grad_(requires_grad)
    operator = []
    monkeypatch.setattr(kernels, "_latent_decode", lambda *given: operator.append(given) or given[0])
    out = kernels.latent_decode(*arguments)
    if n_new == 256:
        assert out is arguments[0] and len(operator) == 1
        return
    assert not operator
    assert_close(out, _exact(arguments), 1e-6)
    if requires_grad:
        out.sum().backward()
        assert arguments[0].grad.abs().sum() > 0
        with torch.no_grad():
            kernels.latent_decode(*arguments)
        assert len(operator) == 1


BAD = [
    ({"rank": 0}, r"rank=0 must be"),
    ({"rank": 25}, r"rank=25 must be"),
    ({"state": torch.zeros(3, 40, 20)}, r"state \(3, 40, 20\) torch.float32 must have the last dimension"),
    ({"state": torch.zeros(3, 40, 24).half()}, r"torch.float16 must have .* the dtype of q"),
    ({"state": torch.zeros(2, 40, 24)}, "must have 3 rows and the 2 new tokens"),
    ({"state": torch.zeros(3, 1, 24)}, "must have 3 rows and the 2 new tokens"),
    ({"token_scale": torch.zeros(3, 40)}, "with token_scale .* as quantise_latent returns them"),
    ({"state": torch.zeros(3, 40, 16).to(torch.float8_e4m3fn), "token_scale": torch.zeros(3, 40)}, "rope_key is None"),
    (
        {"state": torch.zeros(3, 40, 16).to(torch.float8_e4m3fn), "token_scale": torch.zeros(3, 40).half()},
        "token_scale is torch.float16",
    ),
    ({"starts_B": torch.zeros(2, dtype=torch.int64)}, r"starts \(2,\) torch.int64 must be integers of shape \(3,\)"),
    ({"starts_B": torch.zeros(3)}, r"starts \(3,\) torch.float32 must be integers"),
    ({"visible_before_BT": torch.zeros(3, 1, dtype=torch.int64)}, r"visible_before \(3, 1\)"),
    ({"page_table_BP": torch.zeros(3, 4, dtype=torch.int64)}, "torch.int64 must be"),
    (
        {"state": torch.zeros(9, 24, 24), "page_table_BP": torch.zeros(3, 4, dtype=torch.int32)},
        "pages hold 24 tokens; it must be a power of two of at least 16",
    ),
    ({"n_signal": 1, "noise_weight": torch.zeros(())}, "n_signal=1 of 4 heads"),
    ({"noise_weight": torch.zeros(())}, "n_signal=4 of 4 heads"),
    ({"n_signal": 2}, r"noise_weight None must be \(\), \(2,\)"),
    ({"n_signal": 2, "noise_weight": torch.zeros(3)}, r"noise_weight \(3,\) must be"),
    ({"q_BTHE": torch.zeros(3, 2, 4, 24, dtype=torch.int64)}, "q is torch.int64"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_input(changes, message):
    given = {"q_BTHE": torch.zeros(3, 2, 4, 24), "state": torch.zeros(3, 40, 24), "rank": 16, "scale": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        latent_decode(given.pop("q_BTHE"), given.pop("state"), **given)


GPU_LENGTHS = [0, 1, 64, 65, 1000, 2049]
GPU_CASES = [(1, 16, 16), (8, 16, 16), (1, 32, 16), (3, 32, 16), (1, 17, 16), (2, 17, 16)]  # tokens, heads, signal


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("state", ["contiguous", "pages", "float8"])
@pytest.mark.parametrize("n_new, heads, signal", GPU_CASES)
def test_kernel_on_the_gpu(n_new, heads, signal, state, dtype, poisoned):
    """With the configurations of the product, at the widths of kepler-wiki."""
    sizes = {"batch": 6, "n_new": n_new, "heads": heads, "n_keys": 2064, "rank": 512, "rope": 64}
    q, memory, rank, _, starts = _inputs(**sizes, lengths=GPU_LENGTHS, dtype=dtype)
    rest = {"signal": signal, "w": None if signal == heads else _draw(signal)}
    if state == "pages":
        memory, rest["table"] = _paged(memory, 16)
    elif state == "float8":
        rest["rope"] = memory[..., rank:].contiguous()
        memory, rest["tokens"] = quantise_latent(memory[..., :rank])
    arguments = _arguments(q, memory, rank, 0.05, starts, **rest)
    _check(arguments, None, None)
    assert torch.equal(kernels.run(*arguments), kernels.run(*arguments))


@pytest.mark.gpu
def test_a_cuda_graph_serves_other_lengths():
    q, state, rank, _, starts = _inputs(batch=4, heads=16, n_keys=2048, rank=512, rope=64, lengths=[1, 100, 1000, 2048])
    arguments = _arguments(q, state.nan_to_num(), rank, 0.05, starts)
    kernels.run(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.run(*arguments)
    for lengths in ([2048, 1, 0, 77], [0, 0, 0, 2048], [5, 6, 7, 8]):
        starts.copy_(torch.tensor(lengths) - 1)
        graph.replay()
        assert_close(out, _exact(arguments), 1e-5)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """The last keys of the second row, which alone are seen."""
    state = torch.empty(2, 2**21, 576, device="cuda", dtype=torch.bfloat16)
    state[:, -101:].normal_()
    q = _draw(2, 1, 16, 576, dtype=torch.bfloat16)
    visible = torch.full((2, 1), 100, device="cuda")
    exact = _exact(_arguments(q, state[:, -101:].contiguous(), 512, 0.05))
    for config in (None, kernels.Config(64, 2, 4, 1, tma=False)):
        found = kernels.run(*_arguments(q, state, 512, 0.05, visible=visible), config=config)
        assert_close(found, exact, 1e-2)
