"""RMSNorm and rotary embedding of heads against the reference in float64."""

import pytest
import torch

from fusedlm.nn.norm import rms_norm
from fusedlm.nn.rope import apply_rope, rope_table
from fusedlm.ops import rmsnorm_rope, rope_append
from fusedlm.ops.rotary import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.rotary.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# batch, tokens, heads, width, half of the rotated part, heads with a gain
SHAPES = [(2, 3, 5, 16, 8, 3), (1, 1, 3, 24, 4, 3), (3, 1, 1, 9, 0, 1), (1, 4, 7, 80, 40, 0), (1, 1, 1, 2, 1, 1)]


def _inputs(shape, dtype=torch.float32, rows=None):
    batch, tokens, heads, width, half, gained = shape
    g = torch.Generator().manual_seed(sum(shape))
    packed = torch.randn(batch, tokens, heads + 2, width, generator=g).to(DEVICE, dtype)
    positions = torch.randint(0, 5000, (batch if rows is None else rows, tokens), generator=g)
    cos, sin = (x.to(DEVICE) for x in rope_table(positions, 2 * half, 1e4, torch.float32))
    return packed[:, :, 1:-1], cos, sin, torch.randn(gained, generator=g).to(DEVICE)


def _check(shape, eps, with_gain, dtype, floor, rows=None):
    x, cos, sin, gain = _inputs(shape, dtype, rows)
    gain = gain if with_gain else None
    found = kernels.rmsnorm_rope(x, cos, sin, eps, gain)
    exact = reference.rmsnorm_rope(x.double(), cos.double(), sin.double(), eps, None if gain is None else gain.double())
    same = reference.rmsnorm_rope(x, cos, sin, eps, gain)
    assert found.dtype == dtype and found.is_contiguous()
    assert_close(found.double(), exact, max(2 * error_ratio(same.double(), exact), floor))


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel(shape, eps, with_gain, rows):
    _check(shape, eps, with_gain, torch.float32, 1e-6, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (256, 1, 20, 128, 64, 10), (2, 1000, 16, 64, 32, 8)], ids=str)
def test_the_kernel_on_a_gpu(shape, dtype):
    for eps, with_gain in ((None, False), (1e-5, False), (1e-5, True)):
        _check(shape, eps, with_gain, dtype, 1e-6)


def test_it_is_norm_gain_and_rope():
    x, cos, sin, gain = _inputs((2, 3, 5, 16, 6, 5))
    expected = apply_rope(rms_norm(x, 1e-5) * gain[:, None], (cos, sin))
    assert_close(rmsnorm_rope(x, cos, sin, eps=1e-5, gain_H=gain, backend="reference"), expected, 1e-6)


def test_gradients_run_the_reference():
    x, cos, sin, gain = _inputs(SHAPES[0])
    x = x.clone().requires_grad_()
    found = torch.autograd.grad(kernels.rmsnorm_rope(x, cos, sin, 1e-5, gain).square().sum(), x)[0]
    expected = torch.autograd.grad(reference.rmsnorm_rope(x, cos, sin, 1e-5, gain).square().sum(), x)[0]
    assert torch.equal(found, expected)


def test_the_operator_passes_opcheck():
    x, cos, sin, gain = _inputs(SHAPES[0])
    torch.library.opcheck(torch.ops.fusedlm.rmsnorm_rope.default, (x, cos, sin, 1e-5, gain))
    torch.library.opcheck(torch.ops.fusedlm.rmsnorm_rope.default, (x, cos, sin, None, None))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_BTHD": torch.ones(2, 3, 4)}, "must be"),
        ({"sin_BTR": torch.ones(1, 3, 1, 1)}, "must be"),
        ({"cos_BTR": torch.ones(1, 2, 1, 2), "sin_BTR": torch.ones(1, 2, 1, 2)}, "2 R at most D"),
        ({"cos_BTR": torch.ones(1, 3, 1, 3), "sin_BTR": torch.ones(1, 3, 1, 3)}, "2 R at most D"),
        ({"gain_H": torch.ones(6)}, "up to 5 heads"),
    ],
)
def test_bad_input(change, words):
    table = torch.ones(1, 3, 1, 2)
    with pytest.raises(ValueError, match=words):
        rmsnorm_rope(**({"x_BTHD": torch.ones(2, 3, 5, 4), "cos_BTR": table, "sin_BTR": table} | change))


# batch, query heads, key heads, width, half of the rotated part, width of the value, places, norm of heads and of value
APPENDS = [
    (3, 5, 2, 16, 8, 32, 7, True, False),
    (2, 1, 1, 6, 3, 1100, 5, False, True),
    (1, 9, 9, 24, 4, 40, 9, True, True),
]
APPENDS += [(2, 3, 1, 10, 0, 5, 3, False, False)]
POISON = float("nan")


def _append_inputs(shape, dtype=torch.float32):
    batch, heads, groups, width, half, value, places, norm, v_norm = shape
    g = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(*size, generator=g).to(DEVICE)

    q, k = draw(batch, 1, heads + groups + 1, width).to(dtype).split([heads, groups + 1], dim=2)
    starts = torch.randint(3 * places, (batch,), generator=g).to(DEVICE)
    cos, sin = rope_table(starts[:, None], 2 * half, 1e4, torch.float32)
    v = draw(batch, 1, value).to(dtype)
    heads_norm = (1e-5, draw(max(1, heads - 1))) if norm else (None, None)
    return q, k[:, :, :groups], v, starts, cos, sin, *heads_norm, draw(value) if v_norm else None, 1e-6


def _appended(run, shape, inputs, dtype):
    """Queries, and the cache in which keys and values are slices, poisoned where nothing is written."""
    batch, _, groups, width, _, value, places, *_ = shape
    q, k, v, *rest = inputs
    cache = torch.full((batch, places, value + groups * width), POISON, dtype=dtype, device=DEVICE)
    values, keys = cache.split([value, groups * width], dim=-1)
    out = run(q, k, v, keys.unflatten(-1, (groups, width)), values, *rest)
    return out, cache


def _check_append(shape, dtype, floor):
    inputs = _append_inputs(shape, dtype)
    found = _appended(kernels.rope_append, shape, inputs, dtype)
    doubles = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    exact = _appended(reference.rope_append, shape, doubles, torch.float64)
    same = _appended(reference.rope_append, shape, inputs, dtype)
    written = torch.arange(shape[6], device=DEVICE) == (inputs[3] % shape[6])[:, None]
    assert found[0].dtype == dtype and found[0].is_contiguous()
    assert torch.equal(found[1].isnan().all(-1), ~written) and torch.equal(found[1].isnan().any(-1), ~written)
    for i in range(2):
        one, true, other = (x[i].double().nan_to_num() for x in (found, exact, same))
        assert_close(one, true, max(2 * error_ratio(other, true), floor))


@pytest.mark.parametrize("shape", APPENDS, ids=str)
def test_the_appending_kernel(shape):
    _check_append(shape, torch.float32, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [*APPENDS, (1, 10, 10, 128, 64, 1280, 300, True, False), (32, 16, 1, 32, 16, 256, 99, False, True)],
    ids=str,
)
def test_the_appending_kernel_on_a_gpu(shape, dtype):
    _check_append(shape, dtype, 1e-6)


def test_the_reference_writes_one_place_of_each_row():
    q, k, v = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 1, 4), torch.randn(2, 1, 5)
    starts = torch.tensor([1, 8])
    cos, sin = rope_table(starts[:, None], 4, 1e4, torch.float32)
    keys, values = torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 5)
    gain = torch.rand(5)
    found = rope_append(q, k, v, keys, values, starts, cos, sin, eps=1e-5, v_gain_E=gain, backend="reference")
    assert torch.equal(found, rmsnorm_rope(q, cos, sin, eps=1e-5, backend="reference"))
    for b, place in enumerate((1, 2)):
        assert_close(keys[b, place], rmsnorm_rope(k, cos, sin, eps=1e-5, backend="reference")[b, 0], 1e-6)
        assert_close(values[b, place], rms_norm(v, 1e-6, gain)[b, 0], 1e-6)
    assert keys.any(-1).sum() == 2 and values.any(-1).sum() == 2


def test_the_appending_operator_passes_opcheck():
    q, k, v, *rest = _append_inputs(APPENDS[0])
    keys, values = torch.zeros(3, 7, 2, 16, device=DEVICE), torch.zeros(3, 7, 32, device=DEVICE)
    torch.library.opcheck(torch.ops.fusedlm.rope_append.default, (q, k, v, keys, values, *rest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_BTHD": torch.ones(2, 2, 3, 4)}, r"must be \(B, 1, H, D\)"),
        ({"k_BTGD": torch.ones(2, 1, 1, 6)}, r"must be \(B, 1, H, D\)"),
        ({"v_BTE": torch.ones(3, 1, 5)}, "the same B"),
        ({"starts_B": torch.zeros(1).long()}, "the same B"),
        ({"keys_BSGD": torch.ones(2, 7, 2, 4)}, r"must be \(B, S, G, D\)"),
        ({"values_BSE": torch.ones(2, 6, 5)}, r"must be \(B, S, G, D\)"),
        ({"cos_BTR": torch.ones(2, 1, 1, 3), "sin_BTR": torch.ones(2, 1, 1, 3)}, "2 R at most 4"),
        ({"gain_H": torch.ones(4)}, "up to 3 heads"),
        ({"v_gain_E": torch.ones(4)}, r"must be \(5,\)"),
        ({"v_BTE": torch.ones(2, 1, 5, requires_grad=True)}, "requires gradients"),
    ],
)
def test_bad_appends(change, words):
    table = torch.ones(1, 1, 1, 2)
    tensors = {"q_BTHD": torch.ones(2, 1, 3, 4), "k_BTGD": torch.ones(2, 1, 1, 4), "v_BTE": torch.ones(2, 1, 5)}
    tensors |= {"keys_BSGD": torch.ones(2, 7, 1, 4), "values_BSE": torch.ones(2, 7, 5)}
    tensors |= {"starts_B": torch.zeros(2).long(), "cos_BTR": table, "sin_BTR": table}
    with pytest.raises(ValueError, match=words):
        rope_append(**(tensors | change))
