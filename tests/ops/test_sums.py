"""Final reduction of partial sums against float64."""

import pytest
import torch

from fusedlm.testing import assert_close, error_ratio

sums = pytest.importorskip("fusedlm.ops.common.sums")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (1, 40), (2, 16), (3, 17), (528, 64), (511, 33), (1056, 6), (1057, 100), (8448, 1), (8193, 3)]


def _partials(n_partials, width):
    g = torch.Generator().manual_seed(n_partials + width)
    return torch.randn(n_partials, width, generator=g).to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_sums(shape, poisoned):
    partials = _partials(*shape)
    found, exact = sums.column_sums(partials, torch.float32), partials.double().sum(0)
    assert found.dtype == torch.float32
    assert_close(found, exact, max(4 * error_ratio(partials.sum(0), exact), 1e-6))
    assert torch.equal(found, sums.column_sums(partials, torch.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_summed_exactly(shape, poisoned):
    partials = (8 * _partials(*shape)).round()
    assert torch.equal(sums.column_sums(partials, torch.float32), partials.sum(0))


@pytest.mark.parametrize("shapes", [((528, 64), (1056, 6)), ((1, 1), (8193, 33)), ((700, 17), (0, 5))], ids=str)
def test_two_reductions_in_one_kernel_equal_separate_ones(shapes, poisoned):
    first, second = (_partials(*shape) for shape in shapes)
    found = sums.column_sums_of_two(first, torch.float32, second, torch.bfloat16)
    assert torch.equal(found[0], sums.column_sums(first, torch.float32))
    assert torch.equal(found[1], sums.column_sums(second, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_float32_and_rounded_once(dtype, poisoned):
    """Integers that cancel to small ones, which every dtype holds, with partial sums that only float32 holds."""
    large, small = (1000 * _partials(600, 24)).round(), (30 * _partials(1, 24)).round()
    found = sums.column_sums(torch.cat([large, small, -large.flip(0)]), dtype)
    assert torch.equal(found, small[0].to(dtype))


@pytest.mark.parametrize("width", [1, 5, 16, 100])
def test_no_partials_sum_to_zero(width, poisoned):
    assert torch.equal(
        sums.column_sums(_partials(0, width), torch.bfloat16), torch.zeros(width).to(DEVICE, torch.bfloat16)
    )


@pytest.mark.parametrize("shape", [(700, 17), (8448, 1), (1056, 6)], ids=str)
def test_cancelling_partials(shape, poisoned):
    """A thousandth of each element is left, with at most the rounding error of the additions it goes through."""
    partials = _partials(*shape)
    partials = torch.cat([partials, partials[:1], -partials * (1 + 1e-3 * partials)])
    n_additions = 20  # 3 steps of the loop and a tree over at most 2^13 rows
    error = (sums.column_sums(partials, torch.float32) - partials.double().sum(0)).abs()
    assert (error <= n_additions * 2**-24 * partials.double().abs().sum(0)).all()


def test_memory_around_the_partials_is_not_read():
    larger = torch.full((700, 37), float("nan"), device=DEVICE)
    larger[1:-1] = _partials(698, 37)
    assert_close(sums.column_sums(larger[1:-1], torch.float32), larger[1:-1].double().sum(0), 1e-6)
