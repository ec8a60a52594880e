"""RMSNorm and rotary embedding of heads against the reference in float64."""

import pytest
import torch

from fusedlm.nn.norm import rms_norm
from fusedlm.nn.rope import apply_rope, rope_table
from fusedlm.ops import rmsnorm_rope
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
